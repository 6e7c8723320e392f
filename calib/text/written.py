"""Text that a model writes itself, sampled from its own distribution."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from artifacts.model.hooks import evaluating
from artifacts.model.transformers_release import cache_argument
from calib.text.errors import CorpusError
from calib.text.hub_datasets import SELF
from calib.text.records import Split
from calib.text.script import Script

Progress = Callable[[Iterable[Any]], Iterator[Any]]
"""Wraps the steps, as a progress bar does."""

_MEMORY_SHARE = 8
"""Texts that are written at a time take at most one of so many parts of a device's memory."""


class WrittenText:
    """Windows of text that a model writes, each one a text of its own from its first token on.

    Every token is drawn from the model's distribution: temperature 1, nothing cut off. Where a part ends, the tokens of
    the script come in between, and the text goes on within the window. Window `i` of a seed and a split has random
    numbers of its own; equal machines, threads and numbers of windows give equal text.

    Parameters
    ----------
    model : PreTrainedModel
        Causal language model; writes in full precision.
    script : Script
        What the model does not write itself.
    split : {'calibration', 'evaluation'}
        Equal seeds give other texts for the one than for the other.
    progress : Callable
        Wraps the steps of a batch, one token of each of its windows.
    """

    name = SELF

    def __init__(self, model: Any, script: Script, split: Split, progress: Progress = iter) -> None:
        self._model = model
        self._script = script
        self._split = split
        self._progress = progress
        self._kept: dict[tuple[int, int, int | None], Int64[Tensor, "_ _"]] = {}

    def windows(
        self, n_windows: int, seqlen: int, seed: int, start_token: int | None = None
    ) -> Int64[Tensor, "windows tokens"]:
        """Windows of a seed; those that were written before are not written again.

        Parameters
        ----------
        n_windows : int
            Number of windows.
        seqlen : int
            Tokens of a window.
        seed : int
            Seed of the drawing.
        start_token : int or None
            First token of every window, where the script begins with another one.

        Raises
        ------
        CorpusError
            If a window does not hold more than the opening.
        """
        key = (seqlen, seed, start_token)
        if key not in self._kept or len(self._kept[key]) < n_windows:
            self._kept[key] = self._written(n_windows, seqlen, seed, start_token)
        return self._kept[key][:n_windows]

    def _written(
        self, n_windows: int, seqlen: int, seed: int, start_token: int | None
    ) -> Int64[Tensor, "windows tokens"]:
        script = self._script
        if start_token is not None and script.opening[0] != start_token:
            script = replace(script, opening=(start_token, *script.opening))
        if seqlen <= len(script.opening):
            raise CorpusError(
                f"self: expected windows longer than the {len(script.opening)} tokens that every text of this model "
                f"begins with; got {seqlen}; lengthen --seqlen"
            )
        draws = torch.stack([_draws(f"{self._split} {seed} {row}", seqlen) for row in range(n_windows)])
        with torch.no_grad(), evaluating(self._model):
            size = self._rows_at_once(script, seqlen)
            return torch.cat([self._write(script, batch) for batch in draws.split(size)])

    def _rows_at_once(self, script: Script, seqlen: int) -> int:
        """Windows whose caches fit into a share of the memory: of all of it, free or not, so that it stays the same."""
        device = self._model.device
        cache = self._new_cache()
        self._logits([script.opening], cache)
        kept = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
        held = sum(tensor.nbytes for tensor in kept if tensor is not None)
        cuda = device.type == "cuda"
        whole = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
        return max(1, int(whole / _MEMORY_SHARE / (held / len(script.opening) * seqlen)))

    def _write(self, script: Script, draws: Float64[Tensor, "windows tokens"]) -> Int64[Tensor, "windows tokens"]:
        """Windows side by side: at each step every one of them gets a token, so that none is ever padded."""
        writers = [_Writer(script) for _ in draws]
        written = [list(script.opening) for _ in draws]
        cache, step = self._new_cache(), written
        for position in self._progress(range(len(script.opening), draws.shape[1])):
            drawn = _drawn(self._logits(step, cache), draws[:, position])
            step = [[writer.after(token)] for writer, token in zip(writers, drawn, strict=True)]
            for row, tokens in zip(written, step, strict=True):
                row += tokens
        return torch.tensor(written)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _logits(self, rows: Sequence[Sequence[int]], cache: Any) -> Float[Tensor, "rows vocab"]:
        """Logits after the last token of each row."""
        ids = torch.tensor(rows, device=self._model.device)
        logits: Tensor = self._model(ids, use_cache=True, **cache_argument(self._model, cache)).logits
        return logits[:, -1]


class _Writer:
    """Place of one text in its script."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._coming: deque[int] = deque()
        self._part: list[int] = []
        self._n_parts = 0

    def after(self, drawn: int) -> int:
        """The next token: the script's where it has one to say, else the one that was drawn."""
        if self._coming:
            return self._coming.popleft()
        self._part.append(drawn)
        if not self._script.turns:
            return drawn
        turn = self._script.turns[self._n_parts % len(self._script.turns)]
        if drawn in self._script.ends:
            self._next_part(turn[1:])
            return turn[0]
        if tuple(self._part[-len(turn) :]) == turn:  # a header without special tokens: the model wrote it itself
            self._next_part(())
        return drawn

    def _next_part(self, coming: tuple[int, ...]) -> None:
        self._coming.extend(coming)
        self._part.clear()
        self._n_parts += 1


def _draws(seed: str, n_tokens: int) -> Float64[Tensor, "tokens"]:
    """Uniform random numbers in [0, 1) of a seed."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little", signed=True)
    return torch.rand(n_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def _drawn(logits: Float[Tensor, "rows vocab"], draws: Float64[Tensor, "rows"]) -> list[int]:
    """The first token of each row whose cumulative probability exceeds the drawn number."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # The sum of a row is 1 up to rounding: the number is a share of it, not of 1.
    threshold = draws.to(logits.device)[:, None] * cumulative[:, -1:]
    found: list[int] = (
        torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits.shape[1] - 1).tolist()
    )
    return found
