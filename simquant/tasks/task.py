"""Interface of a task: items, and a score for each answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from simquant.tasks.errors import TaskError
from simquant.tasks.item import Item
from simquant.tasks.options import TaskOptions
from simquant.tasks.prediction import Prediction


class Task(ABC):
    """Set of items whose answers can be scored.

    Every item is answered twice, in full precision and with a quantized cache. Subclasses are final, and hold
    configuration only.
    """

    name: str
    """Name on the command line."""

    metric: str
    """Description of the score, for tables."""

    n_items: ClassVar[int] = 100
    """Default number of items."""

    @abstractmethod
    def items(self, options: TaskOptions) -> Sequence[Item]:
        """Items, the same for the same options; a lower limit gives the first of them.

        Raises
        ------
        TaskError
            If the data cannot be loaded, or lacks what the task needs.
        """

    @abstractmethod
    def score(self, text: str, item: Item | Prediction) -> float:
        """Score of an answer, from 0 to 1; `item` holds the references."""

    def scores(self, fp: Prediction, quantized: Prediction) -> tuple[float, float]:
        """Scores of both answers to an item; a task that compares the two with each other overrides this.

        Raises
        ------
        TaskError
            If there is no reference.
        """
        if not fp.references:
            raise TaskError(
                f"{fp.task} {fp.id}: expected a reference to score by; got none. Correct or remove its lines."
            )
        return self.score(fp.text, fp), self.score(quantized.text, quantized)

    def others(self, fp: Prediction, quantized: Prediction) -> dict[str, tuple[float, float]]:
        """Further figures of both answers by name, of which results have the means."""
        return {}
