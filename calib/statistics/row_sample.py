"""Token reservoir: a random sample of tokens that depends on their content and position, not on their order."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class RowChoice:
    """Selection among held and arriving rows, in the order of their priorities."""

    order: Int64[Tensor, " kept"]

    def apply(self, held: Tensor, arriving: Tensor) -> Tensor:
        """Selected rows of a site."""
        return torch.cat([held, arriving.to(held)])[self.order.to(held.device)]


class RowSample:
    """Reservoir of the `capacity` tokens with the smallest priorities; it holds these, the sites hold the rows.

    Parameters
    ----------
    capacity : int
        Largest number of tokens.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.n_seen = 0
        self.priorities = torch.empty(0, dtype=torch.int64)
        self.positions = torch.empty(0, dtype=torch.int64)

    def choose(self, priorities: Int64[Tensor, " tokens"], positions: Int64[Tensor, " tokens"]) -> RowChoice:
        """Adds tokens; returns the selection that every site applies to its rows."""
        # Bottom-k sampling (Cohen and Kaplan, PODC 2007): the k smallest of independent uniform priorities are a
        # uniform sample without replacement, and the k smallest of a union are among the k smallest of its parts, so
        # that merging is exact. Ties go to the lower position.
        both = torch.cat([self.priorities, priorities])
        where = torch.cat([self.positions, positions])
        order = torch.from_numpy(np.lexsort((where.numpy(), both.numpy())))[: self.capacity]
        self.priorities, self.positions = both[order], where[order]
        self.n_seen += len(priorities)
        return RowChoice(order)

    def merge(self, other: "RowSample") -> RowChoice:
        """Adds another reservoir; returns the selection that every site applies to its rows."""
        choice = self.choose(other.priorities, other.positions)
        self.n_seen += other.n_seen - len(other.priorities)
        return choice

    @property
    def complete(self) -> bool:
        """True if every token seen so far is in the reservoir."""
        return self.n_seen <= self.capacity


def priorities(seed: int, positions: Int64[Tensor, " tokens"]) -> Int64[Tensor, " tokens"]:
    """Pseudo-random priorities of tokens from the content of their window and their position (splitmix64).

    Parameters
    ----------
    seed : int
        Digest of the window as a number below 2^64.
    positions : Int64[Tensor, "tokens"]
        Positions within the window, from 0.
    """
    # splitmix64 (Steele, Lea, Flood 2014): the state after position + 1 increments of the golden ratio constant, then
    # its output function; 63 bits fit a signed integer.
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (positions.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(1)).astype(np.int64))
