"""One step for all channels, as wide as a rate allows, and tables of frequencies for the indices."""

from dataclasses import replace
from typing import Literal, final

import torch
from pydantic import Field

from artifacts.quantizer import Quantizer
from artifacts.quantizers.entropy_coded import EntropyCoded, mean_entropy
from calib.estimators.estimator import Allowance, Estimator, Fit
from calib.solvers.index_counts import trade, with_rate
from calib.statistics.site_statistics import SiteShape, SiteStatistics

_LEAST_BITS, _MOST_BITS = 0.01, 8.0

_STREAM_BITS = 48
"""About what a stream takes besides its indices: its length, and half a word at its end."""

_GROUP_ELEMENTS = 2**15
"""Of the tokens that share a stream, whose end costs two thousandths of a bit then."""


@final
class EntropyCodedEstimator(Estimator):
    """The step with which the tokens of the reservoir take the given rate.

    Parameters
    ----------
    bits : float
        Mean bits per channel of whole groups, their streams' ends included, 0.01 to 8.
    centroids : float
        How far what an index stands for lies from the middle of what is rounded to it, at 0, to its mean, at 1. The
        mean has the least squared error; but it makes keys and values shorter, and a model reads them worse for it.
    group_tokens : int or None
        Tokens that share a stream. A cache keeps them exact until they are that many; fewer cost more bits for the ends
        of streams, and more time. None takes 64 for 512 channels and more, and up to 256 for fewer.
    """

    method: Literal["entropy_coded"] = "entropy_coded"
    bits: float = Field(default=1.0, ge=_LEAST_BITS, le=_MOST_BITS)
    centroids: float = Field(default=0.5, ge=0, le=1)
    group_tokens: int | None = Field(default=None, ge=1)

    @property
    def allowance(self) -> Allowance:
        """Any number of bits."""
        return Allowance(unit_bits=1, least=_LEAST_BITS, most=_MOST_BITS)

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads the token reservoir."""
        rows = statistics.rows.cpu()
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
        """What is left of the bits for indices."""
        ends = _STREAM_BITS / (group_tokens * shape.channels)
        if self.bits <= ends:
            raise ValueError(
                f"{shape.site}: streams of {group_tokens} tokens of {shape.channels} channels take {ends:.3g} bits"
                f" per channel for their ends alone; got bits={self.bits}. Raise bits or group_tokens."
            )
        return self.bits - ends

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """There is none: frequencies are counted."""
        raise ValueError("frequencies of indices are counted; calibrate first")
