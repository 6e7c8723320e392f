"""Removal of padding from rows of token ids."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from calib.text.errors import CorpusError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PaddingIds:
    """Token ids that a tokenizer may use as padding.

    Parameters
    ----------
    pad : int or None
        Padding token.
    special : tuple of int
        Start, end and unknown tokens, used as padding by tokenizers without a padding token; a single one at the end of
        a row is text, two or more in succession are padding.
    """

    pad: int | None = None
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> "PaddingIds":
        """Padding and special tokens of a transformers tokenizer; none without one."""
        names = ("bos_token_id", "eos_token_id", "unk_token_id")
        special = [getattr(tokenizer, name, None) for name in names]
        return cls(getattr(tokenizer, "pad_token_id", None), tuple(token for token in special if token is not None))

    def fills(self, token: int, n_tokens: int) -> bool:
        """True if a run of `n_tokens` equal tokens at the end of a row is padding."""
        return (token == self.pad and token not in self.special) or (
            token in (self.pad, *self.special) and n_tokens > 1
        )


def without_padding(
    rows: Int64[Tensor, "rows tokens"], padding: PaddingIds, name: str
) -> tuple[Int64[Tensor, "_"], ...]:
    """Rows without the padding at their ends; rows of padding only are left out.

    Raises
    ------
    CorpusError
        If rows end in runs of a token that occurs nowhere else and is not among `padding`; or if nothing is left.
    """
    found = [_trimmed(row, padding) for row in rows]
    kept = tuple(row for row in found if len(row))
    if not kept:
        raise CorpusError(f"{name}: expected rows of text; got {len(rows)} of padding only; write them again")
    _check_unknown_padding(kept, name)
    n_filled = sum(len(row) < rows.shape[1] for row in found)
    if n_filled:
        n_tokens = rows.numel() - sum(map(len, kept))
        _LOG.warning("%s: padding left out, %d tokens of %d of %d rows", name, n_tokens, n_filled, len(rows))
    return kept


def _trimmed(row: Int64[Tensor, "_"], padding: PaddingIds) -> Int64[Tensor, "_"]:
    for _ in range(2):  # trim the end, reverse, trim the former start, reverse back
        n_tokens = _run(row)
        if n_tokens and padding.fills(int(row[-1]), n_tokens):
            row = row[: len(row) - n_tokens]
        row = row.flip(0)
    return row


def _run(row: Int64[Tensor, "_"]) -> int:
    """Number of equal tokens at the end of a row."""
    if len(row) < 2 or row[-1] != row[-2]:
        return min(len(row), 1)
    others = (row != row[-1]).nonzero()
    return len(row) - 1 - int(others[-1]) if len(others) else len(row)


def _check_unknown_padding(rows: Sequence[Int64[Tensor, "_"]], name: str) -> None:
    """Raises for rows that look padded with an unknown token, at their ends or at their beginnings.

    Raises
    ------
    CorpusError
        Names the token.
    """
    # A token that occurs only in runs at the ends of rows, at least one of two or more, is padding, not text.
    text = torch.cat(list(rows))
    for side in (rows, [row.flip(0) for row in rows]):
        ends = [(int(row[-1]), _run(row)) for row in side]
        for token in sorted({token for token, n_tokens in ends if n_tokens > 1}):
            runs = [n_tokens for own, n_tokens in ends if own == token]
            if int((text == token).sum()) == sum(runs):
                raise CorpusError(
                    f"{name}: expected rows of text; got {len(runs)} that end in up to {max(runs)} times the token "
                    f"{token}, which occurs nowhere else: probably padding unknown to the tokenizer. Remove it from "
                    "the rows, or join them to a 1-D stream without it"
                )
