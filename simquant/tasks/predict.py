"""Predictions: answers in full precision and with a quantized cache, appended to a file."""

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
from simquant.tasks.prompt import prompt_text
from simquant.tasks.protocol import fp_line, prompt_digest, quantized_line
from simquant.tasks.score import check_quantized
from simquant.usage import Usage

Progress = Callable[[Iterable[Any]], Iterable[Any]]

_SIDES: tuple[Side, ...] = ("quantized", "fp")
"""Order of the two models: quantized first, so that a run that quantizes nothing stops before full precision runs."""


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
    """Answers every item with both models, resuming an interrupted run.

    Each item gets an empty cache. An answer is written when it is complete, so that an interrupted run loses one at
    most.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    tokenizer : object
        Tokenizer of the model.
    items : sequence of Item
        Items of any number of tasks.
    quantizers : Artifact or mapping from Site to Quantizer
        See `packed_cache`.
    path : Path
        File of predictions; items that it has answers to are skipped.
    policy : CachePolicy or None
        Tokens kept in full precision; None takes the policy of the artifact.
    chunking : Chunking or None
        Chunked prefill of a prompt; None is one step. Answers are decoded token by token.
    progress : callable
        Wraps the items of a task, for a progress bar.

    Raises
    ------
    TaskError
        If the file holds answers to other prompts, or of another protocol; or if a prompt is too long.
    NothingQuantizedError
        If fewer than 16 bits were asked for, and no token of a task was quantized.
    """
    # Everything that can be wrong is checked before the first answer: ids, lengths of prompts, and old answers.
    models = _Models(model, tokenizer, quantizers, policy or default_policy(quantizers), chunking)
    by_task: dict[str, dict[str, Item]] = {}
    for item in items:
        if by_task.setdefault(item.task, {}).setdefault(item.id, item) is not item:
            raise TaskError(f"{item.task} {item.id}: expected one item of that id; got two. Give each its own id.")
    for item in items:
        prompt_tokens(model, tokenizer, item)  # raises for a prompt that is too long, before any answer
    done = {(p.task, p.id, p.side): p for p in _continued(path)}
    for prediction in done.values():
        _check_same(path, prediction, models, by_task.get(prediction.task, {}))
    with evaluating(model):
        for task, own in by_task.items():
            for side in _SIDES:
                for item in progress([item for item in own.values() if (task, item.id, side) not in done]):
                    prediction = done[task, item.id, side] = models.ask(item, side)
                    append_prediction(path, prediction)
                if side == "quantized":
                    check_quantized(task, [done[task, id, side] for id in own])


class _Models:
    """The model in full precision, and with a quantized cache."""

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
        """Prediction of one of the two models."""
        found, fraction = self._exact(item) if side == "fp" else self._quantized(item)
        return Prediction(
            task=item.task,
            id=item.id,
            side=side,
            format=item.format,
            text=found.text,
            tokens=found.tokens,
            references=item.references,
            choices=item.choices,
            cell=dict(item.cell),
            n_prompt_tokens=found.n_prompt_tokens,
            prompt_digest=self.digest(item),
            protocol=self.protocols[side],
            quantized_fraction=fraction,
        )

    def digest(self, item: Item) -> str:
        """Digest of what the tokenizer reads, its chat template included."""
        return prompt_digest(prompt_text(self._tokenizer, item.prompt, item.format))

    def _exact(self, item: Item) -> tuple[Answer, float | None]:
        return answer(self._model, self._tokenizer, item, chunking=self._chunking), None

    def _quantized(self, item: Item) -> tuple[Answer, float | None]:
        usage = Usage(self._quantizers)
        with packed_cache(self._model, self._quantizers, policy=self._policy, layers=self._layers) as new_cache:
            cache = new_cache()
            found = answer(self._model, self._tokenizer, item, cache=cache, chunking=self._chunking)
            for layer in cache.packed:
                for site, store in layer.store.stores():
                    usage.add_store(site, store)
        if all(quantizer.spec.bits >= 16 for quantizer in self._quantizers.values()):
            return found, None
        return found, usage.quantized_fraction if self._reads_codes(found) else 0.0

    def _reads_codes(self, found: Answer) -> bool:
        """True if a token of the answer is predicted from encoded keys or values."""
        # An exact prefill answers its first token without reading a code, and a window may hold the whole text: then
        # nothing quantized is measured, whatever is stored.
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
    """Predictions of an earlier run; cuts an incomplete last line off its file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    found = read_predictions(path, complete=False)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(whole.rfind(b"\n") + 1)
    return found


def _check_same(path: Path, prediction: Prediction, models: _Models, asked: Mapping[str, Item]) -> None:
    who = f"{path}: {prediction.task} {prediction.id}"
    protocol = models.protocols[prediction.side]
    if prediction.protocol != protocol:
        raise TaskError(
            f"{who}: expected answers of this protocol:\n  {protocol}\ngot those of\n  "
            f"{prediction.protocol}\nWrite to another file, or use the same model, quantizers and options."
        )
    formats = {item.format for item in asked.values()}
    if formats and prediction.format not in formats:
        raise TaskError(
            f"{who}: expected answers to prompts of --task-format {', '.join(formats)}; got one to a prompt of "
            f"--task-format {prediction.format}. Write to another file, or use that format."
        )
    item = asked.get(prediction.id)
    if item is not None and prediction.question != (models.digest(item), item.references, item.choices):
        raise TaskError(
            f"{who}: expected an answer to this prompt, with these references and choices; got one to another prompt. "
            "Write to another file, or use the same data, seed and lengths."
        )
