"""What a quantizer stores for some tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Encoded tokens: the very bytes that a packed cache holds.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Packed codes and the parameters of this call (scales, outliers, ...), by name. Each is ordered by token along
        its first axis: a row for every token or group of tokens, or a list with several entries for each token. Where
        their number varies, the row-wise tensor `counts` holds it, and all its companions are such lists.
    shape : tuple[int, int]
        Tokens and channels of what was encoded.
    dtype : torch.dtype
        Dtype of what was encoded and will be decoded.
    inner : Codes or None
        What the wrapped quantizer of a wrapper stored.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    inner: "Codes | None" = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, scales and indices included."""
        return sum(tensor.nbytes for tensor in self.all_tensors())

    def all_tensors(self) -> Iterator[Tensor]:
        """Everything that is stored, the wrapper's before that of what it wraps."""
        yield from self.tensors.values()
        if self.inner is not None:
            yield from self.inner.all_tensors()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Codes":
        """The same codes with every tensor changed, such as moved to another device."""
        return replace(
            self,
            tensors={name: change(tensor) for name, tensor in self.tensors.items()},
            inner=None if self.inner is None else self.inner.map(change),
        )

    @staticmethod
    def cat(parts: Sequence["Codes"]) -> "Codes":
        """The codes of consecutive tokens as one: what their quantizer gives for all of them at once.

        For quantizers whose scales belong to a group of tokens, every part but the last consists of whole groups.
        """
        first, *others = parts
        if not others:
            return first
        inner = [part.inner for part in parts if part.inner is not None]
        return replace(
            first,
            tensors={name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors},
            shape=(sum(part.shape[0] for part in parts), first.shape[1]),
            inner=Codes.cat(inner) if inner else None,
        )

    def first(self, n_tokens: int) -> "Codes":
        """The codes of the first `n_tokens` tokens, in memory of their own.

        Raises
        ------
        ValueError
            If that would divide a group of tokens, or a list whose entries cannot be told apart by token.
        """
        return replace(
            self,
            tensors={name: tensor[: self._n_entries(name, n_tokens)].clone() for name, tensor in self.tensors.items()},
            shape=(n_tokens, self.shape[1]),
            inner=None if self.inner is None else self.inner.first(n_tokens),
        )

    def select(self, kept: Bool[Tensor, " tokens"]) -> "Codes":
        """The codes of the tokens where `kept` is true, in memory of their own unless it is so everywhere.

        Raises
        ------
        ValueError
            If that would divide a group of tokens, or a list whose entries cannot be told apart by token.
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
        """Which entries of a tensor belong to the tokens."""
        tensor, counts = self.tensors[name], self.tensors.get("counts")
        n_tokens, n_entries = len(kept), len(tensor)
        if counts is not None and name != "counts":
            return self._of_tokens("counts", kept).repeat_interleave(counts.long())
        if not kept.any():
            return kept[:1].expand(n_entries)
        told_apart = tensor.ndim > 1 or not self._in_groups
        if told_apart and n_entries % n_tokens == 0:
            return kept.repeat_interleave(n_entries // n_tokens)
        groups = kept.view(n_entries, -1) if told_apart and n_tokens % n_entries == 0 else kept[None]
        if (groups != groups[:, :1]).any():
            raise ValueError(
                f"Codes: {name} of shape {tuple(tensor.shape)} holds {n_tokens} tokens and cannot lose "
                f"{n_tokens - int(kept.sum())} of these, which share it with others"
            )
        return groups[:, 0]

    def _n_entries(self, name: str, n_tokens: int) -> int:
        """How far into a tensor the first tokens reach."""
        total, tensor, counts = self.shape[0], self.tensors[name], self.tensors.get("counts")
        if n_tokens == total:
            return len(tensor)
        if counts is not None and name != "counts":
            return int(counts[: self._n_entries("counts", n_tokens)].sum())
        if n_tokens * len(tensor) % total or (tensor.ndim == 1 and self._in_groups):
            raise ValueError(
                f"Codes: {name} of shape {tuple(tensor.shape)} holds {total} tokens and cannot be cut after {n_tokens}"
            )
        return n_tokens * len(tensor) // total

    @property
    def _in_groups(self) -> bool:
        """Whether some tensor has one row for several tokens."""
        return "counts" not in self.tensors and any(
            tensor.ndim > 1 and len(tensor) < self.shape[0] for tensor in self.tensors.values()
        )
