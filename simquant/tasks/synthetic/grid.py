"""Grid of prompt lengths and answer depths."""

from collections.abc import Sequence
from itertools import count, islice
from typing import NamedTuple

from simquant.tasks.item import CellValue

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Default depths of a single needle in a prompt."""


class Place(NamedTuple):
    """Cell of the grid, and number of an item in it.

    Parameters
    ----------
    length : int
        Length of the prompt in tokens.
    depth : float or None
        Depth of the needle in the prompt; None for several needles.
    number : int
        Number of the item in the cell, from 0.
    """

    length: int
    depth: float | None
    number: int

    @property
    def id(self) -> str:
        """Identifier such as `512/0.25/3`."""
        return "/".join(str(value) for value in self if value is not None)

    def cell(self, unit: str) -> dict[str, CellValue]:
        """Coordinates of the cell, with a name for the length."""
        return {unit: self.length} if self.depth is None else {unit: self.length, "depth": self.depth}


def places(lengths: Sequence[int], depths: Sequence[float | None], n_items: int) -> list[Place]:
    """Places of n items, dealt to the cells in turn.

    Examples
    --------
    >>> [place.id for place in places([100, 200], [None], 3)]
    ['100/0', '200/0', '100/1']
    """
    dealt = (Place(length, depth, number) for number in count() for length in lengths for depth in depths)
    return list(islice(dealt, n_items))
