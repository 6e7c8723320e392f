"""Items over lengths and depths."""

from collections.abc import Sequence
from itertools import count, islice
from typing import NamedTuple

from simquant.tasks.item import CellValue

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where a single sentence stands in a prompt, if nothing else is asked for."""


class Place(NamedTuple):
    """Which item of which cell.

    Parameters
    ----------
    length : int
        Of the prompt.
    depth : float or None
        Where in the prompt the answer stands, where it stands in one place.
    number : int
        Within the cell, from 0.
    """

    length: int
    depth: float | None
    number: int

    @property
    def id(self) -> str:
        """Such as `512/0.25/3`."""
        return "/".join(str(value) for value in self if value is not None)

    def cell(self, unit: str) -> dict[str, CellValue]:
        """The coordinates, by the name of the length's unit."""
        return {unit: self.length} if self.depth is None else {unit: self.length, "depth": self.depth}


def places(lengths: Sequence[int], depths: Sequence[float | None], n_items: int) -> list[Place]:
    """Each cell once, then each a second time, and so on.

    Examples
    --------
    >>> [place.id for place in places([100, 200], [None], 3)]
    ['100/0', '200/0', '100/1']
    """
    dealt = (Place(length, depth, number) for number in count() for length in lengths for depth in depths)
    return list(islice(dealt, n_items))
