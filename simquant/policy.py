"""Which tokens stay exact, and when the others are encoded."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """What a cache keeps in full precision; everything else is encoded at once.

    Parameters
    ----------
    sink_tokens : int
        First positions of each sequence that stay exact, counted from its first real token.
    """

    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if type(self.sink_tokens) is not int or self.sink_tokens < 0:
            raise ValueError(f"CachePolicy: sink_tokens must be an integer from 0; got {self.sink_tokens!r}")

    def describe(self) -> str:
        """One phrase for reports."""
        exact = "first token exact" if self.sink_tokens == 1 else f"first {self.sink_tokens} tokens exact"
        return exact if self.sink_tokens else "no token exempt"
