"""Which tokens of a sequence a cache still holds, where it has dropped some."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from simquant.cache.errors import CacheStateError


@dataclass(frozen=True, eq=False)
class Survivors:
    """The numbers, in the text, of the tokens that one sequence holds at one layer.

    Parameters
    ----------
    numbers : Int32[Tensor, "held"]
        Ascending, from 0.
    n_seen : int
        Tokens that have come, dropped ones included.
    n_prompt, n_prompt_kept : int
        Tokens of the first step, and how many of them were left after it; 0 before its end.
    evicted_at : int
        `n_seen` when a token was last dropped; 0 before.
    """

    numbers: Int32[Tensor, " held"]
    n_seen: int = 0
    n_prompt: int = 0
    n_prompt_kept: int = 0
    evicted_at: int = 0

    @staticmethod
    def none(device: torch.device) -> "Survivors":
        """Of an empty cache."""
        return Survivors(torch.zeros(0, dtype=torch.int32, device=device))

    def extended(self, n_tokens: int) -> "Survivors":
        """With the tokens that follow."""
        n_seen = self.n_seen + n_tokens
        new = torch.arange(self.n_seen, n_seen, dtype=torch.int32, device=self.numbers.device)
        return replace(self, numbers=torch.cat([self.numbers, new]), n_seen=n_seen)

    def without(self, kept: Bool[Tensor, " held"]) -> "Survivors":
        """With the tokens alone where `kept` is true."""
        return replace(self, numbers=self.numbers[kept], evicted_at=self.n_seen)

    def after_prompt(self) -> "Survivors":
        """At the end of the first step."""
        return replace(self, n_prompt=self.n_seen, n_prompt_kept=len(self.numbers))

    def to(self, device: torch.device) -> "Survivors":
        """On another device."""
        return replace(self, numbers=self.numbers.to(device))

    def columns(self, tokens: slice, n_padding: int) -> Int64[Tensor, " tokens"]:
        """Where held tokens stand in the batch."""
        return self.numbers[tokens].long() + n_padding

    def cropped(self, n_tokens: int, who: str) -> "Survivors":
        """With the first `n_tokens` tokens of the text at most.

        Raises
        ------
        CacheStateError
            If tokens were dropped for what a later one has read.
        """
        if n_tokens >= self.n_seen:
            return self
        if n_tokens < self.evicted_at:
            raise CacheStateError(
                f"{who}: the cache cannot be cropped to {n_tokens} tokens: tokens were evicted when it had seen "
                f"{self.evicted_at}, and they are gone. Generate without an assistant, or without eviction."
            )
        numbers = self.numbers[: int((self.numbers < n_tokens).sum())].clone()
        n_prompt, n_kept = min(self.n_prompt, n_tokens), min(self.n_prompt_kept, len(numbers))
        return replace(self, numbers=numbers, n_seen=n_tokens, n_prompt=n_prompt, n_prompt_kept=n_kept)
