"""Which tokens of a sequence are kept exact for the small norm of their keys."""

from bisect import insort
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor

from artifacts.coding.exact_sums import norm


@dataclass(frozen=True, kw_only=True, eq=False)
class SmallNorms:
    """The tokens of one sequence at one layer whose keys were among the smallest when they came.

    A token is kept if fewer than `n_smallest` tokens before it, sinks left out, have a key that is no longer; a key is
    that of all heads, whose codes are one record. This needs no later token and is never taken back, so that it is the
    same for any chunking and after cropping; rotation changes no norm. Of T tokens in random order about
    n (1 + ln(T / n)) are kept.

    Parameters
    ----------
    n_smallest, sink_tokens : int
        Those of the policy.
    numbers : Int32[Tensor, "kept"]
        The tokens that are kept, numbered in the text, ascending.
    norms : Float32[Tensor, "kept"]
        Of their keys.
    n_seen : int
        Tokens that have come.

    References
    ----------
    Outlier tokens tracing (ACL 2025): a key per channel is stretched by few tokens of small norm, the three smallest of
    which stay exact. There a token gives way to a smaller one, whereas here it stays, since it is encoded once.
    """

    n_smallest: int
    sink_tokens: int
    numbers: Int32[Tensor, " kept"]
    norms: Float32[Tensor, " kept"]
    n_seen: int = 0

    @staticmethod
    def none(n_smallest: int, sink_tokens: int, device: torch.device) -> "SmallNorms":
        """Of an empty cache."""
        numbers, norms = torch.zeros(0, dtype=torch.int32, device=device), torch.zeros(0, device=device)
        return SmallNorms(n_smallest=n_smallest, sink_tokens=sink_tokens, numbers=numbers, norms=norms)

    def extended(self, key: Float[Tensor, "tokens channels"]) -> tuple["SmallNorms", Bool[Tensor, " tokens"]]:
        """With the tokens that follow, and which of these are kept."""
        norms = norm(key.float())[:, 0]
        smallest = sorted(self.norms.tolist())[: self.n_smallest]
        kept = [
            number >= self.sink_tokens and self._enters(length, smallest)
            for number, length in enumerate(norms.tolist(), self.n_seen)
        ]
        chosen = torch.tensor(kept, dtype=torch.bool, device=key.device)
        numbers = (chosen.nonzero()[:, 0] + self.n_seen).int()
        grown = replace(
            self,
            numbers=torch.cat([self.numbers, numbers]),
            norms=torch.cat([self.norms, norms[chosen]]),
            n_seen=self.n_seen + len(key),
        )
        return grown, chosen

    def cropped(self, n_tokens: int) -> "SmallNorms":
        """As it was after the first `n_tokens`; the smallest of them were all kept."""
        before = self.numbers < n_tokens
        return replace(self, numbers=self.numbers[before], norms=self.norms[before], n_seen=min(self.n_seen, n_tokens))

    def to(self, device: torch.device) -> "SmallNorms":
        """On another device."""
        return replace(self, numbers=self.numbers.to(device), norms=self.norms.to(device))

    def _enters(self, length: float, smallest: list[float]) -> bool:
        """Whether a key is among the smallest, in which case it is noted there."""
        if len(smallest) == self.n_smallest and length >= smallest[-1]:
            return False
        insort(smallest, length)
        del smallest[self.n_smallest :]
        return True
