"""Chunked prefill: the token ranges of successive forward passes."""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor, arange

from artifacts.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """Sizes of the forward passes, or steps, that read a text: a prefill, then chunks of equal length.

    Parameters
    ----------
    prefill_tokens : int
        Tokens of the first step.
    chunk_tokens : int
        Tokens of each later step; 1 is decoding token by token.

    Examples
    --------
    >>> Chunking(prefill_tokens=4, chunk_tokens=2).spans(7)
    [(0, 4), (4, 6), (6, 7)]
    """

    prefill_tokens: int = 1
    chunk_tokens: int = 1

    def __post_init__(self) -> None:
        for name, value in (("prefill_tokens", self.prefill_tokens), ("chunk_tokens", self.chunk_tokens)):
            if type(value) is not int or value < 1:
                raise InvalidValueError(f"Chunking: {name} must be an integer from 1; got {value!r}")

    def spans(self, n_tokens: int) -> list[tuple[int, int]]:
        """Start and end token of each step."""
        starts = [0, *range(self.prefill_tokens, n_tokens, self.chunk_tokens)]
        return list(zip(starts, [*starts[1:], n_tokens], strict=True))

    def held(self, n_tokens: int) -> Int64[Tensor, " tokens"]:
        """Number of tokens in the cache when each token's query runs, those of its own step included."""
        # Token t is in the prefill, or in chunk floor((t - prefill) / chunk); the cache then holds all up to its end.
        tokens = arange(n_tokens)
        later = (tokens - self.prefill_tokens).div(self.chunk_tokens, rounding_mode="floor") + 1
        return (self.prefill_tokens + later.clamp_min(0) * self.chunk_tokens).clamp_max(n_tokens)

    def describe(self) -> str:
        """Phrase for reports."""
        chunks = "token by token" if self.chunk_tokens == 1 else f"in chunks of {self.chunk_tokens}"
        if self.prefill_tokens in (1, self.chunk_tokens):
            return chunks
        return f"prefill of {self.prefill_tokens} tokens, then {chunks}"
