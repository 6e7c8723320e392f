"""The place of each token of a forward pass in its sequence, and which tokens are padding, as attention sees them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from artifacts.errors import MismatchError, UnsupportedModelError
from artifacts.model.attention import AttentionLayer
from artifacts.model.transformers_release import named_arguments, parameters, passed_cache

_HIDDEN = -1e4
"""A mask that adds this much or less hides: the weight is nothing in float32, and no bias gets there in every head."""


class Tokens:
    """The tokens that the running attention module has been handed; None stands for 'every token'.

    A token is padding if its own query does not see it, and the tokens before it are those of the cache that the first
    real query sees. Attention computes from nothing else, so that it does not matter who called the model, and how.
    """

    def __init__(self) -> None:
        self.n_past = 0
        self._layer: AttentionLayer | None = None
        self._real: Bool[Tensor, "batch tokens"] | None = None
        self._before: Int64[Tensor, " batch"] | None = None
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._key: tuple[Any, ...] = ()

    @property
    def padded(self) -> bool:
        """Whether some of the tokens, or of those before them, are padding."""
        return self._real is not None or self._before is not None

    def note(self, layer: AttentionLayer, mask: object, size: tuple[int, int], n_past: int) -> None:
        """Takes down a step of `size` sequences and tokens behind `n_past` columns of the cache."""
        self._layer, self.n_past = layer, n_past
        if mask is None:
            self._real = self._before = None
            self._key = ()
            return
        mask = _checked(layer, mask, size)
        key = (size, n_past, None if mask.is_inference() else mask._version)
        if self._seen() is mask and self._key == key:  # the layers of a model are handed the same mask
            return
        real, before = _read(mask, size, n_past, layer.mask_hides)
        self._real = None if real.all() else real.cpu()
        self._before = None if (before == n_past).all() else before.cpu()
        self._seen, self._key = ref(mask), key

    def real(self, batch: int, n_tokens: int) -> Bool[Tensor, "batch tokens"] | None:
        """Tokens that are not padding."""
        return self._real

    def encoded(self, batch: int, n_tokens: int, sink_tokens: int) -> Bool[Tensor, "batch tokens"] | None:
        """Real tokens at or after position `sink_tokens` of their sequence.

        Raises
        ------
        MismatchError
            If a sliding window hides whether a token is one of those.
        """
        if self._real is None and self._before is None and self.n_past >= sink_tokens:
            return None
        real = torch.ones(batch, n_tokens, dtype=torch.bool) if self._real is None else self._real
        before = torch.full((batch,), self.n_past) if self._before is None else self._before
        self._check_window(sink_tokens)
        encoded = real & (before[:, None] + real.cumsum(dim=1) > sink_tokens)
        return None if encoded.all() else encoded

    def _check_window(self, sink_tokens: int) -> None:
        assert self._layer is not None, "the attention module's hook comes first"
        window = self._layer.sliding_window
        if self._before is not None and window is not None and window <= sink_tokens:
            raise MismatchError(
                f"layers.{self._layer.layer}: a sliding window of {window} tokens does not show how many came before "
                f"them; got {sink_tokens} sink_tokens. Keep fewer, or pass texts without padding and in one piece."
            )


@contextmanager
def watch_tokens(layers: Sequence[AttentionLayer]) -> Iterator[Tokens]:
    """Keeps `Tokens` up to date whenever an attention module runs inside the context."""
    tokens = Tokens()
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(_noting(tokens, layer), with_kwargs=True)
            stack.callback(hook.remove)
        yield tokens


def _noting(tokens: Tokens, layer: AttentionLayer) -> Callable[..., None]:
    first, *_ = parameters(layer.module)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed = named_arguments(module, args, kwargs)
        batch, n_tokens = passed[first].shape[:2]
        cache = passed_cache(passed)
        n_past = 0 if cache is None else int(cache.get_seq_length(layer.layer))
        tokens.note(layer, passed.get("attention_mask"), (batch, n_tokens), n_past)

    return note


def _read(
    mask: Tensor, size: tuple[int, int], n_past: int, hides: bool
) -> tuple[Bool[Tensor, "batch tokens"], Int64[Tensor, " batch"]]:
    """Which of the new tokens are real, and how many real ones the cache holds before them."""
    batch, n_tokens = size
    first = min(n_past, mask.shape[-1] - n_tokens)  # a window has dropped columns, a static cache has more to come
    new, every = torch.arange(n_tokens), torch.arange(batch)
    if mask.ndim == 2:
        seen = mask.bool().expand(batch, -1)
        return seen[:, first : first + n_tokens], seen[:, :first].sum(dim=1)
    rows = (mask if mask.ndim == 4 else mask.unsqueeze(1)).expand(batch, -1, n_tokens, -1)
    real = _seen(rows[:, :, new, first + new], hides)
    before = _seen(rows[every, :, real.int().argmax(dim=1).cpu(), :first], hides).sum(dim=1)
    return real, before


def _checked(layer: AttentionLayer, mask: object, size: tuple[int, int]) -> Tensor:
    """A mask that tells padding from text."""
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else ()
    fits = len(shape) in (2, 3, 4) and shape[0] in (1, size[0]) and shape[-1] >= size[1]
    if isinstance(mask, Tensor) and fits and (len(shape) == 2 or shape[-2] in (1, size[1])):
        return mask
    raise UnsupportedModelError(
        f"layers.{layer.layer}: expected a mask of {size[0]} sequences and {size[1]} tokens, (batch, columns) or "
        f"(batch, [heads,] tokens, columns); got {shape or type(mask).__name__}, which does not tell padding from "
        "text. Load the model with attn_implementation='sdpa' or 'eager'."
    )


def _seen(mask: Tensor, hides: bool) -> Bool[Tensor, "batch tokens"]:
    """What any head of a mask "batch heads tokens" shows."""
    shown = mask > _HIDDEN if mask.is_floating_point() else mask.bool() ^ hides
    return shown.any(dim=1)
