"""Estimator of entropy-coded quantization: a uniform step for a given rate, and frequency tables of the indices."""

from dataclasses import replace
from typing import Literal, final

import torch
from pydantic import Field

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.entropy_coded import EntropyCoded, mean_entropy
from calib.estimators.estimator import Allowance, Estimator, Fit
from calib.solvers.index_counts import trade, with_rate
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

_LEAST_BITS, _MOST_BITS = 0.01, 8.0

_STREAM_BITS = 48
"""Mean overhead of a stream in bits: its length (32) and half a word of padding at its end (16)."""

_GROUP_ELEMENTS = 2**15
"""Elements of a stream by default; its overhead is then below two thousandths of a bit per element."""


@final
class EntropyCodedEstimator(Estimator):
    """Step at which the tokens of the reservoir have the given rate.

    A uniform step for all channels is the equal-slope allocation of high-resolution theory: each component gets the
    same distortion, step^2 / 12 (Gersho and Gray, chapter 8).

    Parameters
    ----------
    bits : float
        Mean bits per channel of whole groups, including the overhead of their streams, 0.01 to 8.
    centroids : float
        Reconstruction value of an index, from the middle of its cell (0) to the centroid (1). The centroid has the
        least squared error, but shrinks keys and values, which costs a model more than it saves.
    group_tokens : int or None
        Tokens per stream. A cache keeps them in full precision until a group is full; small groups cost more overhead
        and time. None takes 64 from 512 channels on, and up to 256 for fewer.
    """

    method: Literal["entropy_coded"] = "entropy_coded"
    bits: float = Field(default=1.0, ge=_LEAST_BITS, le=_MOST_BITS)
    centroids: float = Field(default=0.5, ge=0, le=1)
    group_tokens: int | None = Field(default=None, ge=1)

    @property
    def allowance(self) -> Allowance:
        """Bit allowance in units of one bit per token."""
        return Allowance(unit_bits=1, least=_LEAST_BITS, most=_MOST_BITS)

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Step, offsets and frequency tables from the token reservoir."""
        rows = statistics.rows.cpu()
        # Centred at the mean, so that the most frequent index is near zero and tables are short.
        offset = rows.double().mean(dim=0).float()
        group_tokens = self.group_tokens or min(256, max(64, _GROUP_ELEMENTS // rows.shape[1]))
        counted = with_rate(rows - offset, self._index_bits(statistics.shape, group_tokens))
        first, n_indices, frequencies = counted.tables()
        quantizer = EntropyCoded(
            channels=rows.shape[1],
            bits=mean_entropy(frequencies, rows.shape[1]),
            group_tokens=group_tokens,
            step=torch.full((1,), counted.step),
            offset=offset,
            first=first,
            n_indices=n_indices,
            frequencies=frequencies,
            shifts=(self.centroids * counted.shifts()).half() if self.centroids else None,
        )
        found = Fit(quantizer, f"reservoir of {len(rows)} tokens")
        return replace(found, trade=lambda: trade(rows - offset, self.allowance.most))

    def _index_bits(self, shape: SiteShape, group_tokens: int) -> float:
        """Bits per channel for indices, without the overhead of streams."""
        ends = _STREAM_BITS / (group_tokens * shape.channels)
        if self.bits <= ends:
            raise InvalidValueError(
                f"{shape.site}: bits must exceed the overhead of {ends:.3g} bits per channel of streams of "
                f"{group_tokens} tokens and {shape.channels} channels; got {self.bits}. Raise bits or group_tokens."
            )
        return self.bits - ends

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Raises ValueError: frequencies are counted."""
        raise InvalidValueError("frequencies of indices are counted; calibrate first")
