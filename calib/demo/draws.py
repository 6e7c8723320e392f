"""Random choices that are the same on every machine and in every Python release."""

from collections.abc import Sequence
from random import Random
from typing import TypeVar, final

T = TypeVar("T")


@final
class Draws:
    """Reproducible random choices.

    Only `Random.random` is used, whose sequence for a seed Python promises to keep; a text seed is hashed by a fixed
    function.

    Parameters
    ----------
    seed : str
        Seed of the sequence.
    """

    def __init__(self, seed: str) -> None:
        self._random = Random(seed).random

    def below(self, n: int) -> int:
        """Integer from 0 to n - 1."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """Integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """Sample of n different items, in random order."""
        pool = list(items)
        for i in range(n):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]
