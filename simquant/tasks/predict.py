"""Answers of both models, written to a file as they come."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from artifacts.artifact import Artifact
from artifacts.model.attention import attention_layers
from artifacts.model.hooks import evaluating
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.cache.packed import packed_cache
from simquant.policy.checks import default_policy
from simquant.policy.policy import CachePolicy
from simquant.protocols.chunking import Chunking
from simquant.protocols.protocol import Protocol
from simquant.tasks.errors import TaskError
from simquant.tasks.generation import Answer, answer, prompt_tokens
from simquant.tasks.item import Item
from simquant.tasks.prediction import Prediction, Side, append_prediction, read_predictions
from simquant.tasks.protocol import fp_line, prompt_digest, quantized_line
from simquant.tasks.score import check_quantized
from simquant.usage import Usage

Progress = Callable[[Iterable[Any]], Iterable[Any]]

_SIDES: tuple[Side, ...] = ("quantized", "fp")
"""Quantized answers first: if nothing was quantized, that is known before the exact model is asked."""


def predict(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    quantizers: Artifact | Mapping[Site, Quantizer],
    path: Path,
    *,
    policy: CachePolicy | None = None,
    chunking: Chunking | None = None,
    progress: Progress = iter,
) -> None:
    """Asks both models every item, and goes on where an earlier run stopped.

    Each text gets an empty cache of its own. An answer is written when it is complete, so that an interrupted run loses
    one at most.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    tokenizer : object
        Its transformers tokenizer.
    items : sequence of Item
        Of any number of tasks.
    quantizers : Artifact or mapping from Site to Quantizer
        See `packed_cache`.
    path : Path
        File of predictions; answers that it holds are not asked for again.
    policy : CachePolicy or None
        Which tokens stay exact; None takes what the artifact says.
    chunking : Chunking or None
        How a prompt enters the cache; None is all at once. Answers are always token by token.
    progress : callable
        Wraps the items of a task, for a progress bar.

    Raises
    ------
    TaskError
        If the file holds answers to other prompts, or of another protocol; or a prompt is too long.
    NothingQuantizedError
        If fewer than 16 bits were asked for, and a task saw no quantized token.
    """
    speakers = _Speakers(model, tokenizer, quantizers, policy or default_policy(quantizers), chunking)
    by_task: dict[str, dict[str, Item]] = {}
    for item in items:
        if by_task.setdefault(item.task, {}).setdefault(item.id, item) is not item:
            raise TaskError(f"{item.task} {item.id}: expected one item of that id; got two")
    for item in items:
        prompt_tokens(model, tokenizer, item)  # what is too long is refused before anything is asked
    done = {(p.task, p.id, p.side): p for p in _continued(path)}
    for prediction in done.values():
        _check_same(path, prediction, speakers.protocols, by_task.get(prediction.task, {}).get(prediction.id))
    with evaluating(model):
        for task, own in by_task.items():
            for side in _SIDES:
                for item in progress([item for item in own.values() if (task, item.id, side) not in done]):
                    prediction = done[task, item.id, side] = speakers.ask(item, side)
                    append_prediction(path, prediction)
                if side == "quantized":
                    check_quantized(task, [done[task, id, side] for id in own])


class _Speakers:
    """The exact model and the quantized one."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        quantizers: Mapping[Site, Quantizer],
        policy: CachePolicy,
        chunking: Chunking | None,
    ) -> None:
        self._model, self._tokenizer, self._chunking = model, tokenizer, chunking
        self._quantizers, self._policy = quantizers, policy
        self._layers = attention_layers(model)
        self.protocols: dict[Side, str] = {
            "fp": fp_line(model, self._layers),
            "quantized": quantized_line(model, self._layers, quantizers, policy, chunking),
        }

    def ask(self, item: Item, side: Side) -> Prediction:
        """The answer of one of them."""
        found, fraction = self._exact(item) if side == "fp" else self._quantized(item)
        return Prediction(
            task=item.task,
            id=item.id,
            side=side,
            text=found.text,
            tokens=found.tokens,
            references=item.references,
            choices=item.choices,
            cell=dict(item.cell),
            n_prompt_tokens=found.n_prompt_tokens,
            prompt_digest=prompt_digest(item.prompt),
            protocol=self.protocols[side],
            quantized_fraction=fraction,
        )

    def _exact(self, item: Item) -> tuple[Answer, float | None]:
        return answer(self._model, self._tokenizer, item, chunking=self._chunking), None

    def _quantized(self, item: Item) -> tuple[Answer, float | None]:
        usage = Usage(self._quantizers)
        with packed_cache(self._model, self._quantizers, policy=self._policy, layers=self._layers) as new_cache:
            cache = new_cache()
            found = answer(self._model, self._tokenizer, item, cache=cache, chunking=self._chunking)
            for layer in cache.layers:
                for site, store in layer.store.stores():
                    usage.add_store(site, store)
        if all(quantizer.spec.bits >= 16 for quantizer in self._quantizers.values()):
            return found, None
        return found, usage.quantized_fraction if self._reads_codes(found) else 0.0

    def _reads_codes(self, found: Answer) -> bool:
        """Whether a token of the answer is predicted from keys or values that have codes."""
        chunking = self._chunking or Chunking(prefill_tokens=found.n_prompt_tokens)
        protocol = Protocol(name="cache", policy=self._policy, chunking=chunking)
        windows = {layer.layer: layer.sliding_window for layer in self._layers}
        n_answer = len(found.tokens)
        return any(
            protocol.reads_codes(
                tensor, found.n_prompt_tokens + n_answer, n_scored=n_answer, sliding_window=windows[layer]
            )
            for layer, tensor in {(site.layer, site.tensor) for site in self._quantizers}
        )


def _continued(path: Path) -> list[Prediction]:
    """What an earlier run has written, without the line in which it was stopped."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    found = read_predictions(path, complete=False)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(whole.rfind(b"\n") + 1)
    return found


def _check_same(path: Path, prediction: Prediction, protocols: Mapping[Side, str], item: Item | None) -> None:
    who = f"{path}: {prediction.task} {prediction.id}"
    if prediction.protocol != protocols[prediction.side]:
        raise TaskError(
            f"{who}: expected answers of this protocol:\n  {protocols[prediction.side]}\ngot those of\n  "
            f"{prediction.protocol}\nWrite to another file, or take the same model, quantizers and options."
        )
    if item is not None and prediction.question != (prompt_digest(item.prompt), item.references, item.choices):
        raise TaskError(
            f"{who}: expected the answer to this prompt, with these references and choices; got that to another. Write "
            "to another file, or take the same data, seed and lengths."
        )
