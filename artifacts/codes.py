"""Codes: the encoded form of some tokens, as a packed cache stores it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from jaxtyping import Bool
from torch import Tensor

from artifacts.coding.span import Span
from artifacts.errors import InvalidValueError

_ONE_EACH = Span()


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Encoded tokens: packed codes with scales, offsets and outliers, exactly the bytes that a packed cache holds.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Packed codes and the dynamic parameters (scales, offsets, outliers, ...) by name, each ordered by token along
        its first axis.
    shape : tuple[int, int]
        Tokens and channels of the encoded tensor.
    dtype : torch.dtype
        Dtype of the encoded tensor and of the decoded one.
    spans : Mapping[str, Span]
        Layout of these tensors along the tokens; a tensor without a span has one entry per token.
    inner : Codes or None
        Codes of the wrapped quantizer, for a wrapper.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    spans: Mapping[str, Span] = field(default_factory=dict)
    inner: "Codes | None" = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            span = self.span(name)
            wanted = span.n_entries(self.shape[0])
            if wanted not in (None, len(tensor)):
                raise InvalidValueError(
                    f"Codes: {name} has {len(tensor)} entries; {self.shape[0]} tokens with {span.entries} for each "
                    f"{span.tokens} need {wanted}. Give the number of entries for each run of tokens in `spans`"
                )

    def span(self, name: str) -> Span:
        """Layout of a tensor along the tokens."""
        return self.spans.get(name, _ONE_EACH)

    def check(self) -> None:
        """Validates codes that were read from a file: tensors have as many entries as `counts` says.

        Raises
        ------
        ValueError
            If a tensor has another number of entries.
        """
        for name, tensor in self.tensors.items():
            n_counted = int(self.tensors["counts"].sum()) if self.span(name).entries == "counts" else len(tensor)
            if n_counted != len(tensor):
                raise InvalidValueError(
                    f"Codes: {name} must have the {n_counted} entries that counts says; got {len(tensor)}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, scales and outlier indices included."""
        return sum(tensor.nbytes for tensor in self.all_tensors())

    def all_tensors(self) -> Iterator[Tensor]:
        """All stored tensors, those of a wrapper before those of the quantizer inside."""
        yield from self.tensors.values()
        if self.inner is not None:
            yield from self.inner.all_tensors()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Codes":
        """The same codes with a function applied to every tensor, such as a move to another device."""
        return replace(
            self,
            tensors={name: change(tensor) for name, tensor in self.tensors.items()},
            inner=None if self.inner is None else self.inner.map(change),
        )

    @staticmethod
    def cat(parts: Sequence["Codes"], join: Callable[[list[Tensor]], Tensor] = torch.cat) -> "Codes":
        """Concatenation of the codes of consecutive tokens, equal to encoding them in one call.

        Parameters
        ----------
        parts : Sequence[Codes]
            In order.
        join : callable
            Joins tensors along their first axis.

        Raises
        ------
        ValueError
            If a part before the last one ends within a group of tokens, or their groups differ.
        """
        # Empty parts carry no tokens but may have other spans; keep one only if all are empty.
        first, *others = [part for part in parts if part.shape[0]] or parts[:1]
        if not others:
            return first
        first._check_followed_by(others)
        inner = [part.inner for part in (first, *others) if part.inner is not None]
        return replace(
            first,
            tensors={name: join([part.tensors[name] for part in (first, *others)]) for name in first.tensors},
            shape=(sum(part.shape[0] for part in (first, *others)), first.shape[1]),
            inner=Codes.cat(inner, join) if inner else None,
        )

    def first(self, n_tokens: int) -> "Codes":
        """Codes of the first `n_tokens` tokens; see `select`."""
        return self.select(torch.arange(self.shape[0]) < n_tokens)

    def select(self, kept: Bool[Tensor, " tokens"]) -> "Codes":
        """Codes of the tokens where `kept` is true, as a copy unless all are kept.

        Raises
        ------
        ValueError
            If that would divide a group of tokens, or a packed stream without known boundaries between tokens.
        """
        if kept.all():
            return self
        return replace(
            self,
            tensors={name: tensor[self._of_tokens(name, kept)] for name, tensor in self.tensors.items()},
            shape=(int(kept.sum()), self.shape[1]),
            inner=None if self.inner is None else self.inner.select(kept),
        )

    def _of_tokens(self, name: str, kept: Bool[Tensor, " tokens"]) -> Bool[Tensor, " entries"]:
        """Mask of the entries of a tensor that belong to kept tokens."""
        span, n_entries = self.span(name), len(self.tensors[name])
        runs = span.runs(kept.to(self.tensors[name].device))
        if span.entries == "counts":
            return runs.repeat_interleave(self.tensors["counts"].long())
        if span.entries is not None:
            return runs.repeat_interleave(span.entries)
        # entries is None: chunks of different lengths follow one another, and only the quantizer knows where each ends.
        if runs.any():
            raise InvalidValueError(
                f"Codes: cannot drop {int((~kept).sum())} of {len(kept)} tokens: {name} does not say where the entries "
                f"of each {span.tokens} tokens end; drop all of them or none"
            )
        return runs[:1].expand(n_entries)

    def _check_followed_by(self, others: Sequence["Codes"]) -> None:
        for part, following in pairwise((self, *others)):
            cut = [name for name in part.tensors if part.shape[0] % part.span(name).tokens]
            if cut or part.spans != following.spans:
                raise InvalidValueError(
                    f"Codes: {part.shape[0]} tokens cannot be followed by {following.shape[0]}: expected whole groups "
                    f"of one size; got {dict(part.spans)} and {dict(following.spans)}"
                )
