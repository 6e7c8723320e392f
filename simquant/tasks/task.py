"""What a task is: items, and a score for each answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from simquant.tasks.errors import TaskError
from simquant.tasks.item import Item
from simquant.tasks.options import TaskOptions
from simquant.tasks.prediction import Prediction


class Task(ABC):
    """Questions whose answers can be scored.

    A task is asked twice for every item, once for the exact model and once for the quantized one. Subclasses are final,
    and hold configuration only.
    """

    name: str
    """As on the command line."""

    metric: str
    """What `score` measures, for tables."""

    n_items: ClassVar[int] = 100
    """How many items are asked where no limit is given."""

    @abstractmethod
    def items(self, options: TaskOptions) -> Sequence[Item]:
        """The items, the same for the same options; a lower limit gives the first of them.

        Raises
        ------
        TaskError
            If the data cannot be had or is not what the task needs.
        """

    @abstractmethod
    def score(self, text: str, item: Item | Prediction) -> float:
        """How good an answer is, from 0 to 1; `item` holds the references."""

    def scores(self, fp: Prediction, quantized: Prediction) -> tuple[float, float]:
        """The scores of both answers to an item; a task that compares them with each other replaces this.

        Raises
        ------
        TaskError
            If there is no reference to hold them against.
        """
        if not fp.references:
            raise TaskError(f"{fp.task} {fp.id}: expected a reference to score by; got none. Mend or remove its lines.")
        return self.score(fp.text, fp), self.score(quantized.text, quantized)

    def others(self, fp: Prediction, quantized: Prediction) -> dict[str, tuple[float, float]]:
        """Further figures of both answers by name; results carry their means."""
        return {}
