"""A sample of tokens that depends on their content and position only, never on the order in which they came."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class RowChoice:
    """Rows to keep of those held so far and of those that arrive, in the order of their priorities."""

    order: Int64[Tensor, " kept"]

    def apply(self, held: Tensor, arriving: Tensor) -> Tensor:
        """The kept rows of a site's vectors."""
        return torch.cat([held, arriving.to(held)])[self.order.to(held.device)]


class RowSample:
    """The `capacity` tokens with the smallest priorities; the sites keep the rows, this keeps which.

    Parameters
    ----------
    capacity : int
        Tokens kept at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.n_seen = 0
        self.priorities = torch.empty(0, dtype=torch.int64)
        self.positions = torch.empty(0, dtype=torch.int64)

    def choose(self, priorities: Int64[Tensor, " tokens"], positions: Int64[Tensor, " tokens"]) -> RowChoice:
        """Takes in tokens; says which rows every site has to keep."""
        both = torch.cat([self.priorities, priorities])
        where = torch.cat([self.positions, positions])
        order = torch.from_numpy(np.lexsort((where.numpy(), both.numpy())))[: self.capacity]
        self.priorities, self.positions = both[order], where[order]
        self.n_seen += len(priorities)
        return RowChoice(order)

    def merge(self, other: "RowSample") -> RowChoice:
        """Takes in another sample; says which rows every site has to keep."""
        choice = self.choose(other.priorities, other.positions)
        self.n_seen += other.n_seen - len(other.priorities)
        return choice

    @property
    def complete(self) -> bool:
        """Whether every token that was seen is kept."""
        return self.n_seen <= self.capacity


def priorities(seed: int, positions: Int64[Tensor, " tokens"]) -> Int64[Tensor, " tokens"]:
    """Pseudo-random numbers that follow from a window's content and a position (splitmix64).

    Parameters
    ----------
    seed : int
        Digest of the window as a number below 2^64.
    positions : Int64[Tensor, "tokens"]
        Positions within the window, from 0.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (positions.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(1)).astype(np.int64))
