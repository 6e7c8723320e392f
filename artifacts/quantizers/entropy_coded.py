"""Entropy-coded scalar quantizer: one uniform step for all channels, indices in a range coder."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int16, Int32, Int64
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_vector
from artifacts.coding.finite import answer_now
from artifacts.coding.frequency_coder import LARGEST_INDEX, TOTAL, FrequencyCoder
from artifacts.coding.span import Span
from artifacts.errors import InvalidValueError
from artifacts.quantizer import Context, Quantizer

_ROUNDING = 1e-6
"""Tolerance of `bits`, a mean of logarithms whose last digits depend on the order of summation."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class EntropyCoded(Quantizer):
    """Uniform quantizer x ~ offset + step * (index + shift), with one range-coded stream per group of tokens.

    The rate is an average: frequent indices take a fraction of a bit, and an index outside its table is escaped and
    decoded exactly. The values of a token do not depend on its group, but only whole groups can be decoded.

    Parameters
    ----------
    bits : float
        Mean bits per channel of indices that are as frequent as the tables say, escape symbols included.
    group_tokens : int
        Tokens per stream; each stream costs 4 bytes for its length and rounds up to a 4-byte word.
    step : Float32[Tensor, "1"]
        Quantization step of all channels, in units of x.
    offset : Float32[Tensor, "channels"]
        Value of index 0, in units of x.
    first, n_indices : Int16[Tensor, "channels"]
        Smallest index of each channel's table, and how many it has.
    frequencies : Int16[Tensor, "symbols"]
        All tables, one after the other: the frequencies of a table's indices, then that of its escape symbol, with the
        sum 2^15.
    shifts : Float16[Tensor, "indices"] or None
        Centroid of each index's cell relative to the index, in steps, for every table; None for zeros.
    """

    kind: ClassVar[str] = "entropy_coded"

    bits: float
    group_tokens: int
    step: Float32[Tensor, "1"]
    offset: Float32[Tensor, " channels"]
    first: Int16[Tensor, " channels"]
    n_indices: Int16[Tensor, " channels"]
    frequencies: Int16[Tensor, " symbols"]
    shifts: Float16[Tensor, " indices"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_tokens < 1:
            raise InvalidValueError(f"{self.kind}: group_tokens must be at least 1; got {self.group_tokens}")
        check_vector(self.kind, "step", self.step, 1, positive=True)
        check_vector(self.kind, "offset", self.offset, self.channels)
        self._check_tables()
        entropy = mean_entropy(self.frequencies, self.channels)
        if not math.isclose(self.bits, entropy, abs_tol=_ROUNDING):
            raise InvalidValueError(f"{self.kind}: bits must be {entropy}, as frequencies says; got {self.bits}")

    @property
    def tokens_per_scale(self) -> int:
        """Tokens of a group, whose stream cannot be divided."""
        return self.group_tokens

    @property
    def is_causal(self) -> bool:
        """True: tokens of a group have a common stream, but no value depends on another token."""
        return True

    def ideal_bits(self, x: Float[Tensor, "tokens channels"]) -> float:
        """Bits that an ideal entropy coder with these tables needs for the tokens."""
        return self._coder.ideal_bits(self._indices(x.float()).cpu().numpy())

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        answer_now()  # report NaN before the coder sees indices made of it; the coder waits for the device anyway
        groups = self._indices(x.float()).cpu().split(self.group_tokens, dim=1) if len(x) else ()
        # One stream per group, so that a cache can evict or read a group without decoding the ones before it.
        streams = [self._coder.encode(group.numpy()) for group in groups]
        counts = torch.tensor([len(words) for words in streams], dtype=torch.int32)
        words = torch.from_numpy(np.concatenate([np.zeros(0, np.uint32), *streams]).view(np.int32))
        tensors = {"counts": counts.to(x.device), "words": words.to(x.device)}
        spans = {"counts": Span(self.group_tokens), "words": Span(self.group_tokens, "counts")}
        return Codes(tensors=tensors, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, spans=spans)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        words = codes.tensors["words"]
        streams = [part.numpy().view(np.uint32) for part in words.cpu().split(codes.tensors["counts"].tolist())]
        starts = range(0, codes.shape[0], self.group_tokens)
        if len(streams) != len(starts):
            raise InvalidValueError(
                f"{self.label}: {codes.shape[0]} tokens must have {len(starts)} streams of {self.group_tokens} tokens; "
                f"got {len(streams)}"
            )
        indices = torch.zeros(self.channels, codes.shape[0], dtype=torch.int32)
        for start, stream in zip(starts, streams, strict=True):
            group = indices[:, start : start + self.group_tokens]
            group.copy_(torch.from_numpy(self._coder.decode(stream, group.shape[1])))
        # The centroid of a cell, not its middle, has the least squared error: shifts point to where values are denser.
        indices = indices.to(words.device)
        return (self.offset[:, None] + self.step * (indices + self._shift(indices))).T

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Distance from the offset."""
        return (x - self.offset).abs()

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True where an index is escaped."""
        places = self._indices(x.float()) - self.first[:, None]
        return ((places < 0) | (places >= self.n_indices[:, None])).T

    def _indices(self, x: Float32[Tensor, "tokens channels"]) -> Int32[Tensor, "channels tokens"]:
        # Indices beyond 2^20 saturate, as the escape code has a limited length.
        return ((x - self.offset) / self.step).T.round().clamp(-LARGEST_INDEX, LARGEST_INDEX).int()

    def _shift(self, indices: Int32[Tensor, "channels tokens"]) -> Float32[Tensor, "#channels #tokens"]:
        """Centroid shift of each index; zero for an escaped index."""
        if self.shifts is None:
            return torch.zeros(1, 1, device=indices.device)
        # Tables are concatenated: entry = start of the channel's table + index - first index of that table.
        places = indices - self.first[:, None]
        known = (places >= 0) & (places < self.n_indices[:, None])
        starts = (self.n_indices.long().cumsum(0) - self.n_indices)[:, None]
        return torch.take(self.shifts.float(), torch.where(known, places + starts, 0)).where(known, 0.0)

    @functools.cached_property
    def _coder(self) -> FrequencyCoder:
        tables = self.frequencies.cpu().split((self.n_indices + 1).tolist())
        return FrequencyCoder(self.first.tolist(), [table.numpy() for table in tables])

    def _check_tables(self) -> None:
        for name, tensor in (("first", self.first), ("n_indices", self.n_indices)):
            if tensor.dtype != torch.int16 or tensor.shape != (self.channels,):
                raise InvalidValueError(
                    f"{self.kind}: {name} must be int16 of shape ({self.channels},); got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
        lengths = self.n_indices.long()
        n = int(lengths.clamp_min(1).sum())
        if (lengths < 1).any():
            raise InvalidValueError(f"{self.kind}: n_indices must be at least 1; got {int(lengths.min())}")
        if self.frequencies.dtype != torch.int16 or self.frequencies.shape != (n + self.channels,):
            raise InvalidValueError(
                f"{self.kind}: frequencies must be int16 of shape ({n + self.channels},), as n_indices says; got "
                f"{self.frequencies.dtype} of shape {tuple(self.frequencies.shape)}"
            )
        if (self.frequencies < 1).any() or (_table_sums(self.frequencies.long(), lengths) != TOTAL).any():
            sums = _table_sums(self.frequencies.long(), lengths).unique().tolist()
            raise InvalidValueError(
                f"{self.kind}: frequencies must be positive, and {TOTAL} in each table; got a smallest of "
                f"{int(self.frequencies.min())} and sums {sums[:8]}"
            )
        if self.shifts is not None and (self.shifts.dtype != torch.float16 or self.shifts.shape != (n,)):
            raise InvalidValueError(
                f"{self.kind}: shifts must be float16 of shape ({n},), as n_indices says; got {self.shifts.dtype} of "
                f"shape {tuple(self.shifts.shape)}"
            )
        if self.shifts is not None and not (self.shifts.abs() <= 1).all():
            raise InvalidValueError(
                f"{self.kind}: shifts must be from -1 to 1; got {float(self.shifts.abs().max()):.4g}"
            )


def mean_entropy(frequencies: Int16[Tensor, " symbols"], channels: int) -> float:
    """Entropy of the tables in bits per symbol, a mean over the channels."""
    # H = -sum p log2 p of each table, p = frequency / TOTAL: the least mean length of a code (Shannon 1948, theorem 9).
    p = frequencies.double() / TOTAL
    return float((-p * p.log2()).sum() / channels)


def _table_sums(values: Int64[Tensor, " symbols"], n_indices: Int64[Tensor, " channels"]) -> Int64[Tensor, " channels"]:
    owner = torch.arange(len(n_indices), device=values.device).repeat_interleave(n_indices + 1)
    return torch.zeros_like(n_indices).index_add_(0, owner, values)
