"""Estimator of non-uniform quantization: codebooks by one-dimensional k-means, or fixed ones."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, final

import torch
from jaxtyping import Float16, Float64
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from calib.estimators.codebook_levels import Levels, Solver, fitted, fixed
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.estimators.normal_values import (
    Histogram,
    exact_constants,
    normal_values,
    normalisation,
    or_middle,
    pooled,
    rebin,
)
from calib.estimators.outliers import Outliers
from calib.estimators.ranges import Ranges, ThresholdDtype, channel_ranges
from calib.solvers.kmeans import kmeans_1d
from calib.solvers.lloyd import kmeans_lloyd
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.token_histogram import OUTLIER_FRACTIONS, bin_centers, token_histogram

Weights = Literal["none", "scale2", "fisher", "fisher_scale2", "query", "query_scale2"]

_SITE_BINS = 4096
"""Bins over [-1, 1] for one codebook per site or head: within 1e-6 of the optimum for any number of values."""

_CHANNEL_BINS = 512
"""Bins over [-1, 1] for a codebook per channel."""

_FINEST_LEVEL_BINS = 4
"""Least number of histogram bins per level; coarser channels are fitted to the token reservoir."""


@final
class CodebookEstimator(Estimator):
    """Codebook with the least weighted squared error of the normalised values (arXiv 2401.18079, equation 7).

    Parameters
    ----------
    bits : int
        Code width, 1 to 8.
    n_levels : int or None
        Number of levels, 2 to 256; None for 2^bits. `bits` must be the smallest code width for it.
    levels : {'fitted', 'normal_float', 'gaussian', 'laplace'}
        Fitted by k-means; NormalFloat over the ranges; or Lloyd-Max levels of a distribution over mean and deviation.
    per : {'channel', 'token', 'unit'}
        Normalised by static ranges of the channels, by the range of each token, or not at all, for values that have
        variance 1 already.
    tables : {'site', 'head', 'channel'}
        One fitted codebook for all channels, or one per head or channel.
    weights : {'none', 'scale2', 'fisher', 'fisher_scale2', 'query', 'query_scale2'}
        Weight of a normalised value: 1; the squared half-range of its channel or token, which gives the error of x
        itself; its squared gradient; the energy of the queries of its key channel, which needs no gradients; or one of
        these times the squared half-range.
    pooling : float
        With a codebook per channel: weight of the site's average histogram relative to that of the channel, against
        overfitting to few calibration tokens.
    qnorm : bool
        Q-Norm: gives decoded values the mean and deviation of the original ones (arXiv 2401.18079); codes are chosen
        as without it.
    outliers : Outliers or None
        Outliers stored in 16 bits.
    threshold_dtype : {'float32', 'float16'}
        Precision of the ends of static ranges.
    kmeans : {'exact', 'sklearn'}
        Solver of the fit: the global optimum, or scikit-learn's k-means with the settings of KVQuant.
    random_state : int
        Seed of scikit-learn's start; KVQuant's is 0.

    Notes
    -----
    ``kmeans: sklearn`` fits the histograms that the exact solver fits: all calibration values, normalised, in 4096
    bins (512 for a table per channel; channels with too few bins of their own come from the token reservoir). A bin
    is one point at the mean of its values (over token ranges, at its middle), weighted by their number. KVQuant's
    released code fits the values one by one, in the order in which they came. The rule is the same, but the same
    random numbers choose other starting points: a fit is another draw from the local optima that KVQuant can end in.
    To replay it, say ``weights: none`` or, with gradients, ``fisher``: the defaults here weigh values otherwise.
    """

    method: Literal["codebook"] = "codebook"
    bits: int = Field(default=4, ge=1, le=8)
    n_levels: int | None = Field(default=None, ge=2, le=256)
    levels: Levels = "fitted"
    per: Literal["channel", "token", "unit"] = "channel"
    tables: Literal["site", "head", "channel"] = "site"
    weights: Weights = "scale2"
    pooling: float = Field(default=0.1, ge=0, le=1)
    qnorm: bool = False
    outliers: Outliers | None = None
    threshold_dtype: ThresholdDtype = "float32"
    kmeans: Literal["exact", "sklearn"] = "exact"
    random_state: int = Field(default=0, ge=0, lt=2**32)

    @model_serializer(mode="wrap")
    def _without_exact_solver(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The fields; the solver only where it is not the exact one, so that older manifests stay as they are."""
        written = write(self)
        if self.kmeans == "exact":
            for name in ("kmeans", "random_state"):
                written.pop(name, None)
        return written

    @model_validator(mode="after")
    def _possible(self) -> "CodebookEstimator":
        if self.per == "token" and self.tables != "site":
            raise InvalidValueError("a range per token needs one table per site; use tables: site, or per: channel")
        if self.per == "token" and self.weights.startswith("query"):
            raise InvalidValueError("query weights are per key channel; with per: token use weights: scale2 or none")
        if self.per == "token" and self.levels in ("gaussian", "laplace"):
            raise InvalidValueError(f"{self.levels} levels need mean and deviation; with per: token use normal_float")
        if self.per == "unit" and self.levels not in ("gaussian", "laplace"):
            raise InvalidValueError("per: unit does not normalise values; use levels: gaussian or laplace")
        if self.n_levels is not None and not 2 ** (self.bits - 1) < self.n_levels <= 2**self.bits:
            needed = (self.n_levels - 1).bit_length()
            raise InvalidValueError(f"{self.n_levels} levels need {needed} bits; use bits: {needed}, or drop n_levels")
        if self.qnorm and self.levels != "fitted":
            raise InvalidValueError("qnorm adjusts fitted levels; drop it, or use levels: fitted")
        if self.kmeans != "exact" and self.levels != "fitted":
            raise InvalidValueError(f"kmeans: {self.kmeans} fits levels; drop it, or use levels: fitted")
        if self.kmeans == "exact" and self.random_state:
            raise InvalidValueError(
                "the exact solver draws no random numbers; drop random_state, or use kmeans: sklearn"
            )
        return self

    @property
    def needs_fisher(self) -> bool:
        """True if values are weighted by squared gradients."""
        return self.weights.startswith("fisher")

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads ranges and histograms; the token reservoir where those are too coarse."""
        if self.per == "unit" or (self.per == "token" and self.levels != "fitted"):
            return Fit(self.dynamic(statistics.shape), EXACT)
        return self._fit_tokens(statistics) if self.per == "token" else self._fit_channels(statistics)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Fixed levels over the range of each token, or without normalisation."""
        if self.levels == "fitted" or self.per == "channel":
            raise InvalidValueError(
                "codebooks are fitted; calibrate first: calibrate MODEL --recipe NAME --quantizer-path q.safetensors"
            )
        channels, table = shape.channels, fixed(self.levels, self._n_levels)
        inner: Quantizer = DynamicCodebook(channels=channels, bits=self.bits, levels=table)
        if self.per == "unit":
            one = torch.ones(channels)
            inner = Codebook(channels=channels, bits=self.bits, scale=one, offset=0 * one, levels=table)
        return self.outliers.wrap(inner, None) if self.outliers else inner

    @property
    def _n_levels(self) -> int:
        return self.n_levels or 2**self.bits

    @property
    def _solver(self) -> Solver:
        return kmeans_1d if self.kmeans == "exact" else partial(kmeans_lloyd, random_state=self.random_state)

    @property
    def _fraction(self) -> float:
        return self.outliers.fraction if self.outliers else 0.0

    def _fit_tokens(self, statistics: SiteStatistics) -> Fit:
        channels = statistics.shape.channels
        weights, source = self._token_weights(statistics)
        if not weights.any():  # all tokens are constant, and any levels represent them
            weights = torch.ones_like(weights)
        histogram = bin_centers(len(weights), weights.device)[None], weights[None]
        table = fitted(histogram, self._n_levels, self.qnorm, self._solver)
        inner = DynamicCodebook(channels=channels, bits=self.bits, **table)
        return Fit(self.outliers.wrap(inner, None) if self.outliers else inner, source)

    def _token_weights(self, statistics: SiteStatistics) -> tuple[Float64[Tensor, " bins"], str]:
        """Histogram over the range of each token, and its provenance."""
        histogram = statistics.fisher_token_histogram if self.needs_fisher else statistics.token_histogram
        if self._fraction in OUTLIER_FRACTIONS:
            row = OUTLIER_FRACTIONS.index(self._fraction)
            counts, squared, source = histogram.counts[row], histogram.weights[row], EXACT
        else:
            rows = statistics.rows
            squares = statistics.row_gradients.double().square() if self.needs_fisher else None
            counts, squared = token_histogram(rows, self._fraction, histogram.bins, squares)
            source = f"reservoir of {len(rows)} tokens"
        return squared if self.weights.endswith("scale2") else counts.double(), source

    def _fit_channels(self, statistics: SiteStatistics) -> Fit:
        ranges = channel_ranges(statistics, self._fraction, self.threshold_dtype)
        if self.levels in ("gaussian", "laplace"):
            scale_offset, source = _spread(statistics), EXACT
        else:
            scale_offset, source = normalisation(ranges, self.threshold_dtype), ranges.source
        if self.levels == "fitted":
            histogram, n_coarse = self._histogram(statistics, ranges, scale_offset)
            table = fitted(histogram, self._n_levels, self.qnorm, self._solver)
            source += f"; reservoir for {n_coarse} channels" if n_coarse else ""
        else:
            table = {"levels": fixed(self.levels, self._n_levels)}
        scale, offset = exact_constants(scale_offset, _nearest_zero(table["levels"], len(ranges.low)), ranges)
        inner = Codebook(channels=len(scale), bits=self.bits, scale=scale, offset=offset, **table)
        return Fit(self.outliers.wrap(inner, ranges) if self.outliers else inner, source)

    def _histogram(
        self, statistics: SiteStatistics, ranges: Ranges, scale_offset: tuple[Tensor, Tensor]
    ) -> tuple[Histogram, int]:
        """Histogram of each codebook, and the number of channels from the token reservoir."""
        # [-1, 1] has a mean level distance of 2 / n; wider bins than a quarter of it would decide the boundaries.
        step = 2 / (self._n_levels * _FINEST_LEVEL_BINS)
        values, n_coarse = normal_values(statistics, ranges, scale_offset, step, fisher=self.needs_fisher)
        channels, shape = len(ranges.low), statistics.shape
        if self.tables == "channel":
            return pooled(rebin(values, channels, _CHANNEL_BINS), self.pooling), n_coarse
        tables = shape.heads if self.tables == "head" else 1
        weights = values.weights * self._channel_weights(statistics, scale_offset[0])[values.channel]
        # Channels of a head are adjacent, so channel // (channels / tables) is the head, or 0 for one table.
        table = torch.div(values.channel, channels // tables, rounding_mode="floor")
        return or_middle(rebin(values._replace(channel=table, weights=weights), tables, _SITE_BINS)), n_coarse

    def _channel_weights(self, statistics: SiteStatistics, scale: Tensor) -> Float64[Tensor, " channels"]:
        weights = torch.ones(len(scale), dtype=torch.float64)
        if self.weights.startswith("query"):
            if statistics.query_energy is None:
                raise InvalidValueError(
                    f"{statistics.shape.site}: weights: {self.weights} needs a key site with queries; got none. Use "
                    "weights: scale2 or none."
                )
            weights = statistics.query_energy
        # x - x' = s (a - a'): an error in units of x weighs s^2, the factor that KVQuant's equation 7 has and its code
        # leaves out.
        return weights * scale.double().square() if self.weights.endswith("scale2") else weights


def _spread(statistics: SiteStatistics) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of each channel; deviation 1 for a constant."""
    # Var x = E[x^2] - E[x]^2, from the diagonal of the second moments of each head.
    mean = statistics.moments.mean()
    deviation = (statistics.moments.second().diagonal(dim1=1, dim2=2).flatten() - mean.square()).clamp_min(0).sqrt()
    return torch.where(deviation > 0, deviation, 1.0).float().cpu(), mean.float().cpu()


def _nearest_zero(levels: Float16[Tensor, "tables levels"], channels: int) -> Float16[Tensor, " channels"]:
    """Level nearest zero of each channel."""
    nearest = levels.gather(1, levels.float().abs().argmin(dim=1, keepdim=True))[:, 0]
    return nearest.repeat_interleave(channels // len(nearest))
