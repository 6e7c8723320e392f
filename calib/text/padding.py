"""Padding at the ends of rows of token ids, which is no text."""

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
    """Token ids with which a tokenizer's rows are filled up.

    Parameters
    ----------
    pad : int or None
        Its padding token.
    special : tuple of int
        Its start, end and unknown tokens, with which rows are filled up where there is no other; a single one at the
        end of a row is text, two in a row are not.
    """

    pad: int | None = None
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> "PaddingIds":
        """Those of a tokenizer of transformers; none without one."""
        names = ("bos_token_id", "eos_token_id", "unk_token_id")
        special = [getattr(tokenizer, name, None) for name in names]
        return cls(getattr(tokenizer, "pad_token_id", None), tuple(token for token in special if token is not None))

    def fills(self, token: int, n_tokens: int) -> bool:
        """Whether a run of a token at the end of a row is padding."""
        return (token == self.pad and token not in self.special) or (
            token in (self.pad, *self.special) and n_tokens > 1
        )


def without_padding(
    rows: Int64[Tensor, "rows tokens"], padding: PaddingIds, name: str
) -> tuple[Int64[Tensor, "_"], ...]:
    """The rows without the padding at their ends; a row of nothing else is left out.

    Raises
    ------
    CorpusError
        If rows end in runs of a token that may be padding, as it stands nowhere else, and is not known for it; or if
        nothing is left.
    """
    found = [_trimmed(row, padding) for row in rows]
    kept = tuple(row for row in found if len(row))
    if not kept:
        raise CorpusError(f"{name}: expected rows of text; got {len(rows)} of nothing but padding; write them again")
    _refuse_unknown(kept, name)
    n_filled = sum(len(row) < rows.shape[1] for row in found)
    if n_filled:
        n_tokens = rows.numel() - sum(map(len, kept))
        _LOG.warning("%s: padding left out, %d tokens of %d of %d rows", name, n_tokens, n_filled, len(rows))
    return kept


def _trimmed(row: Int64[Tensor, "_"], padding: PaddingIds) -> Int64[Tensor, "_"]:
    for _ in range(2):  # at its end, then at its beginning, turned round
        n_tokens = _run(row)
        if n_tokens and padding.fills(int(row[-1]), n_tokens):
            row = row[: len(row) - n_tokens]
        row = row.flip(0)
    return row


def _run(row: Int64[Tensor, "_"]) -> int:
    """How many equal tokens a row ends in."""
    if len(row) < 2 or row[-1] != row[-2]:
        return min(len(row), 1)
    others = (row != row[-1]).nonzero()
    return len(row) - 1 - int(others[-1]) if len(others) else len(row)


def _refuse_unknown(rows: Sequence[Int64[Tensor, "_"]], name: str) -> None:
    """Refuses rows that look filled up, all at their ends or all at their beginnings.

    Raises
    ------
    CorpusError
        With the token.
    """
    text = torch.cat(list(rows))
    for side in (rows, [row.flip(0) for row in rows]):
        ends = [(int(row[-1]), _run(row)) for row in side]
        for token in sorted({token for token, n_tokens in ends if n_tokens > 1}):
            runs = [n_tokens for own, n_tokens in ends if own == token]
            if int((text == token).sum()) == sum(runs):
                raise CorpusError(
                    f"{name}: expected rows of text; got {len(runs)} filled up with up to {max(runs)} times the token "
                    f"{token}, which stands nowhere else, as padding does; the tokenizer does not tell. Cut the rows "
                    "off before it, or join them to a 1-D stream without it"
                )
