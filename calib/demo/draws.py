"""Random choices that are the same on every machine and in every Python release."""

from collections.abc import Sequence
from random import Random
from typing import TypeVar, final

T = TypeVar("T")


@final
class Draws:
    """A stream of random choices.

    It uses `Random.random` alone: that is the one method whose numbers Python promises never to change, and a text
    seed is hashed by a fixed function.

    Parameters
    ----------
    seed : str
        Names the stream.
    """

    def __init__(self, seed: str) -> None:
        self._random = Random(seed).random

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """n different items, in random order."""
        pool = list(items)
        for i in range(n):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]
