"""Tokens of a sequence that are kept in full precision for their small key norms."""

from bisect import insort
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor

from artifacts.coding.exact_sums import norm


@dataclass(frozen=True, kw_only=True, eq=False)
class SmallNorms:
    """Tokens of one sequence at one layer whose key norm was among the N smallest when they were appended.

    A token is kept if fewer than `n_smallest` tokens before it, sinks left out, have a key norm as small or smaller.
    The norm is over all heads, whose codes are one record. The choice needs no later token and is final, so that it is
    the same for any chunking and after cropping.

    Parameters
    ----------
    n_smallest, sink_tokens : int
        Numbers of the policy.
    numbers : Int32[Tensor, "kept"]
        Positions of the kept tokens in the text, ascending.
    norms : Float32[Tensor, "kept"]
        Norms of their keys.
    n_seen : int
        Tokens appended so far.

    References
    ----------
    Outlier tokens tracing (ACL 2025): keys quantized per channel lose precision by a few tokens of small norm, of which
    the three smallest are kept. There a smaller token replaces a larger one; here both stay: tokens are encoded once.
    """

    n_smallest: int
    sink_tokens: int
    numbers: Int32[Tensor, " kept"]
    norms: Float32[Tensor, " kept"]
    n_seen: int = 0

    @staticmethod
    def none(n_smallest: int, sink_tokens: int, device: torch.device) -> "SmallNorms":
        """State of an empty cache."""
        numbers, norms = torch.zeros(0, dtype=torch.int32, device=device), torch.zeros(0, device=device)
        return SmallNorms(n_smallest=n_smallest, sink_tokens=sink_tokens, numbers=numbers, norms=norms)

    def extended(self, key: Float[Tensor, "tokens channels"]) -> tuple["SmallNorms", Bool[Tensor, " tokens"]]:
        """State after more tokens, and the mask of those that are kept."""
        # The number of records of a random sequence: token t is among the n smallest of t with probability n / t, so
        # that about n (1 + ln(T / n)) of T tokens are kept. RoPE is a rotation and leaves norms unchanged, so that keys
        # before and after it give the same choice.
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
        """State after the first `n_tokens`; the smallest norms among them are all in `norms`."""
        before = self.numbers < n_tokens
        return replace(self, numbers=self.numbers[before], norms=self.norms[before], n_seen=min(self.n_seen, n_tokens))

    def to(self, device: torch.device) -> "SmallNorms":
        """Copy on another device."""
        return replace(self, numbers=self.numbers.to(device), norms=self.norms.to(device))

    def _enters(self, length: float, smallest: list[float]) -> bool:
        """True if a norm is among the smallest, to which it is then added."""
        if len(smallest) == self.n_smallest and length >= smallest[-1]:
            return False
        insort(smallest, length)
        del smallest[self.n_smallest :]
        return True
