"""Estimator of the norm that tells attention sinks from ordinary tokens."""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal, final

import torch

from artifacts.coding.exact_sums import norm
from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.exact_sinks import LARGEST_NORM, ExactSinks
from artifacts.sites import Site
from calib.estimators.estimator import EXACT, Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

_EXACT_BITS = 16
"""Bits of a value of a kept token."""

_MOST_BITS = 1
"""Mean bits of a value, over all tokens, that kept tokens may cost."""


@final
class ExactSinksEstimator(WrappingEstimator):
    """Keeps later tokens exact whose vectors are as small as that of the first token, where this is an attention sink.

    The threshold is the geometric mean of two medians: the norm of the first tokens of the calibration windows, which a
    recipe with `sink_tokens` leaves out, and the norm of all others. The site is left to the inner quantizer alone
    without `sink_tokens`, where first tokens are not the smaller ones, and where so many others are below the threshold
    that they would cost more than one bit a value.

    Kept tokens are part of the inner fit, as its statistics are those of all tokens; they are small, so that they widen
    no range. Their bits come on top of the inner quantizer's, and of a common budget.

    References
    ----------
    Small values of tokens that are attended to: arXiv 2406.12335; arXiv 2410.10781.
    """

    method: Literal["exact_sinks"] = "exact_sinks"

    def sources(self, site: Site, sites: Collection[Site]) -> tuple[Site, ...]:
        """Sources of the inner estimator."""
        found: tuple[Site, ...] = self.inner.sources(site, sites)
        return found

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Inner fit, wrapped where a threshold tells sinks from other tokens."""
        inner: Fit = self.inner.fit(statistics)
        threshold = sink_threshold(statistics)
        if threshold is None:
            return inner
        quantizer = ExactSinks(
            channels=statistics.shape.channels, inner=inner.quantizer, least_norm=torch.tensor([threshold])
        )
        decoded, rows = inner.decoded, statistics.rows
        if decoded is not None:
            decoded = torch.where(quantizer.mask(rows)[:, None], quantizer.stored(rows).to(rows.dtype), decoded)
        source = inner.source.replace(EXACT, f"{EXACT}; norms of {len(rows)} tokens")
        return replace(inner, quantizer=quantizer, decoded=decoded, source=source)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Raises ValueError: the threshold is fitted."""
        raise InvalidValueError("the norm of sinks is fitted; calibrate first")


def sink_threshold(statistics: SiteStatistics) -> float | None:
    """Norm halfway, on a logarithmic scale, between first tokens and all others; None where it does not pay."""
    if not len(statistics.start_rows) or not len(statistics.rows):
        return None
    norms, of_first = norm(statistics.rows), float(norm(statistics.start_rows).median())
    typical = float(norms.median())
    # Norms are of two classes that differ by a factor: the geometric mean is as many times above the one as it is below
    # the other.
    threshold = (of_first * typical) ** 0.5
    if not 0 < of_first < typical or threshold > LARGEST_NORM:
        return None
    share = float((norms < threshold).double().mean())
    return threshold if _EXACT_BITS * share <= _MOST_BITS else None
