"""Drift: agreement of the quantized model's continuation of a text with that in full precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from simquant.tasks.errors import TaskError
from simquant.tasks.item import Item
from simquant.tasks.options import TaskOptions
from simquant.tasks.prediction import Prediction
from simquant.tasks.task import Task


@final
@dataclass(frozen=True, kw_only=True)
class Drift(Task):
    """Task of continuing ordinary text, with the continuation in full precision as the reference."""

    name: str = "drift"
    metric: str = "share of tokens that agree with full precision"
    n_items: ClassVar[int] = 32
    max_new_tokens: ClassVar[int] = 64

    def items(self, options: TaskOptions) -> Sequence[Item]:
        """Items, one for each text."""
        if not options.texts:
            raise TaskError("drift: expected text to continue; got none. Name some with --dataset.")
        return [
            Item(task=self.name, id=str(index), prompt=text, max_new_tokens=self.max_new_tokens)
            for index, text in enumerate(options.texts[: options.limit or self.n_items])
        ]

    def score(self, text: str, item: Item | Prediction) -> float:
        """Raises: a single answer has no reference."""
        raise TaskError(f"{self.name} {item.id}: expected the answers of both models; got one. Use `scores`.")

    def scores(self, fp: Prediction, quantized: Prediction) -> tuple[float, float]:
        """Score 1 in full precision; share of positions with equal tokens, of the longer answer, for the quantized."""
        if not fp.tokens or not quantized.tokens:
            raise TaskError(f"{fp.task} {fp.id}: expected the tokens of both answers; got none. Remove its lines.")
        # Dividing by the longer answer counts an early end as a difference.
        same = sum(a == b for a, b in zip(fp.tokens, quantized.tokens, strict=False))
        return 1.0, same / max(len(fp.tokens), len(quantized.tokens))

    def others(self, fp: Prediction, quantized: Prediction) -> dict[str, tuple[float, float]]:
        """Figures by name: tokens before the first difference, and share of answers without any."""
        agree = first_divergence(fp.tokens, quantized.tokens)
        return {
            "tokens before the first that differs": (float(len(fp.tokens)), float(agree)),
            "answers without a difference": (1.0, float(fp.tokens == quantized.tokens)),
        }


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int:
    """Position of the first difference; the shorter length if one sequence is a prefix of the other.

    Examples
    --------
    >>> first_divergence([5, 6, 7], [5, 6, 8])
    2
    """
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
