"""Consecutive tokens, and the entries that they have together."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """How the entries of a tensor of `Codes` belong to tokens: in runs, counted from the first token.

    Parameters
    ----------
    tokens : int
        Tokens of a run; the last one may be shorter. What a run stores cannot be divided among its tokens.
    entries : int, 'counts' or None
        Entries of a run, along the tensor's first axis; or as many as the tensor `counts` beside it says; or, with
        None, as many as the quantizer alone can tell.

    Examples
    --------
    >>> Span(tokens=4).n_entries(6)  # the scales of two groups, the second one shorter
    2
    """

    tokens: int = 1
    entries: int | Literal["counts"] | None = 1

    def __post_init__(self) -> None:
        if type(self.tokens) is not int or self.tokens < 1 or not self._has_entries():
            raise ValueError(f"Span: expected positive whole numbers of tokens and entries; got {self}")

    def n_entries(self, n_tokens: int) -> int | None:
        """Entries of so many tokens; None where their number varies."""
        return self.n_runs(n_tokens) * self.entries if isinstance(self.entries, int) else None

    def runs(self, kept: Bool[Tensor, " tokens"]) -> Bool[Tensor, " runs"]:
        """Which runs are kept.

        Raises
        ------
        ValueError
            If a run would be divided.
        """
        if self.tokens == 1:
            return kept
        whole = kept.new_zeros(self.n_runs(len(kept)) * self.tokens)
        whole[: len(kept)] = kept
        whole[len(kept) :] = kept[-1:]
        groups = whole.view(-1, self.tokens)
        if (groups != groups[:, :1]).any():
            raise ValueError(
                f"Codes: cannot drop {int((~kept).sum())} of {len(kept)} tokens: they share scale groups with kept "
                f"tokens; drop whole groups (of {self.tokens} tokens, counted from the first)"
            )
        return groups[:, 0]

    def n_runs(self, n_tokens: int) -> int:
        """Runs of so many tokens."""
        return -(-n_tokens // self.tokens)

    def _has_entries(self) -> bool:
        return self.entries in ("counts", None) or (type(self.entries) is int and self.entries >= 1)
