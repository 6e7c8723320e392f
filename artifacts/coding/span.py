"""Mapping between runs of consecutive tokens and the entries of a tensor of codes."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool
from torch import Tensor

from artifacts.errors import InvalidValueError


@dataclass(frozen=True)
class Span:
    """Layout of a tensor of `Codes` along the tokens: runs of tokens, counted from the first, with some entries each.

    Parameters
    ----------
    tokens : int
        Tokens of a run; the last one may be shorter. The entries of a run cannot be divided among its tokens.
    entries : int, 'counts' or None
        Entries of a run, along the first axis of the tensor; 'counts' if the tensor `counts` beside it holds their
        numbers; None if only the quantizer knows them.

    Examples
    --------
    >>> Span(tokens=4).n_entries(6)  # the scales of two groups, the second one shorter
    2
    """

    tokens: int = 1
    entries: int | Literal["counts"] | None = 1

    def __post_init__(self) -> None:
        if type(self.tokens) is not int or self.tokens < 1 or not self._has_entries():
            raise InvalidValueError(f"Span: expected positive whole numbers of tokens and entries; got {self}")

    def n_entries(self, n_tokens: int) -> int | None:
        """Entries of `n_tokens` tokens; None where their number varies."""
        return self.n_runs(n_tokens) * self.entries if isinstance(self.entries, int) else None

    def runs(self, kept: Bool[Tensor, " tokens"]) -> Bool[Tensor, " runs"]:
        """Mask of the runs whose tokens are kept.

        Raises
        ------
        ValueError
            If only some tokens of a run are kept.
        """
        if self.tokens == 1:
            return kept
        # Fill the last run up with its last token, so that a shorter run counts as kept or dropped as a whole.
        whole = kept.new_zeros(self.n_runs(len(kept)) * self.tokens)
        whole[: len(kept)] = kept
        whole[len(kept) :] = kept[-1:]
        groups = whole.view(-1, self.tokens)
        if (groups != groups[:, :1]).any():
            raise InvalidValueError(
                f"Codes: cannot drop {int((~kept).sum())} of {len(kept)} tokens: they share scale groups with kept "
                f"tokens; drop whole groups (of {self.tokens} tokens, counted from the first)"
            )
        return groups[:, 0]

    def n_runs(self, n_tokens: int) -> int:
        """Runs in `n_tokens` tokens."""
        return -(-n_tokens // self.tokens)

    def _has_entries(self) -> bool:
        return self.entries in ("counts", None) or (type(self.entries) is int and self.entries >= 1)
