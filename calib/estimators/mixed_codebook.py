"""Estimator of codebooks with bit allocation: a number of levels for each channel."""

import math
from bisect import bisect_left
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float64, Int64
from pydantic import Field
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.mixed_codebook import MixedCodebook, mean_bits
from calib.estimators.estimator import Allowance, Estimator, Fit
from calib.estimators.normal_values import (
    Histogram,
    exact_constants,
    normal_values,
    normalisation,
    pooled,
    rebin,
)
from calib.estimators.ranges import channel_ranges
from calib.solvers.compiled import compiled
from calib.solvers.kmeans import distortion_by_levels, kmeans_1d
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

_WORD_BITS, _TOO_LONG = 56, 2**62
"""Longest word of mixed radix (`artifacts.coding.mixed_radix`), and the initial value of a minimum."""

LEVEL_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Numbers of levels that a component can have."""

_BITS = np.array([math.log2(n) for n in LEVEL_COUNTS])

_BUDGET_STEP = 0.25
"""Granularity of the bit budget, in bits per token."""

_LEAST_BITS, _MOST_BITS = 0.25, 8.0

_BINS = 256
"""Histogram bins over the range of a channel."""

_EXACT_LEVELS = 32
"""Largest number of levels whose distortion is computed exactly; beyond, it falls with the square of the number."""


@compiled
def find_hulls(
    distortions: Float64[np.ndarray, "components counts"],
    bits: Float64[np.ndarray, " counts"],
    hulls: Int64[np.ndarray, "components counts"],
    lengths: Int64[np.ndarray, " components"],
) -> None:
    """Writes the points of the lower convex hull of each rate-distortion curve, and their number."""
    # Monotone chain (Andrew 1979): drop the last point while the slope to it is not below the slope from it on. Only
    # points on the hull minimise D + lambda R for some lambda.
    for component in range(len(distortions)):
        row, hull, n = distortions[component], hulls[component], 1
        hull[0] = 0
        for j in range(1, len(bits)):
            if row[j] >= row[hull[n - 1]]:
                continue
            while n > 1 and _slope(bits, row, hull[n - 2], hull[n - 1]) >= _slope(bits, row, hull[n - 1], j):
                n -= 1
            hull[n] = j
            n += 1
        lengths[component] = n


@compiled
def take_steps(
    component: Int64[np.ndarray, " steps"],
    bits: Float64[np.ndarray, " steps"],
    levels: Int64[np.ndarray, " steps"],
    n_components: int,
    budget: float,
) -> Int64[np.ndarray, " components"]:
    """Number of levels of each component after taking steps in order, each until its first that exceeds the budget."""
    counts, stopped = np.ones(n_components, np.int64), np.zeros(n_components, np.bool_)
    for step in range(len(component)):
        owner = component[step]
        if stopped[owner] or bits[step] > budget:
            stopped[owner] = True
            continue
        counts[owner] = levels[step]
        budget -= bits[step]
    return counts


@compiled
def bytes_per_token(n_levels: Int64[np.ndarray, " channels"]) -> int:
    """Bytes of a token, as by `artifacts.coding.mixed_radix.bytes_per_token`."""
    coded = n_levels[n_levels > 1]
    bits = np.zeros(len(coded) + 1, np.int64)  # from each digit on
    for start in range(len(coded) - 1, -1, -1):
        product, width, least = 1, 0, _TOO_LONG
        for stop in range(start, len(coded)):
            # Compared by division: a product of 2^56 times 256 levels overflows 64 bits, silently in compiled code.
            if product > 2**_WORD_BITS // coded[stop]:
                break
            product *= coded[stop]
            while product > 1 << width:
                width += 1
            least = min(least, bits[stop + 1] + width)
        bits[start] = least
    whole: int = (bits[0] + 7) // 8
    return whole


@compiled
def _slope(bits: Float64[np.ndarray, " counts"], row: Float64[np.ndarray, " counts"], i: int, j: int) -> float:
    slope: float = (row[j] - row[i]) / (bits[j] - bits[i])
    return slope


class _Steps(NamedTuple):
    """Increments along the convex hulls of all components, from the steepest on.

    Parameters
    ----------
    slope : Float64[ndarray, "steps"]
        Change of distortion per bit: negative, and ascending.
    component : Int64[ndarray, "steps"]
        Component of the increment.
    bits : Float64[ndarray, "steps"]
        Bits of the increment.
    levels : Int64[ndarray, "steps"]
        Levels of the component after it.
    """

    slope: Float64[np.ndarray, " steps"]
    component: Int64[np.ndarray, " steps"]
    bits: Float64[np.ndarray, " steps"]
    levels: Int64[np.ndarray, " steps"]


def allocate_levels(distortions: Float64[Tensor, "components counts"], bits: float) -> list[int]:
    """Bit allocation: number of levels of each component for a small total distortion within a budget of bytes.

    Distortion is not convex in log2 of the number of levels, so increments lead from one point of a component's convex
    hull to the next; those of all components are taken from the steepest on. If one does not fit the rest of the
    budget, smaller ones of other components still may.

    Parameters
    ----------
    distortions : Float64[Tensor, "components counts"]
        Distortion of each component with each number of levels in `LEVEL_COUNTS`.
    bits : float
        Mean bits per component; the bytes of a whole token, in mixed radix, are at most this.

    Returns
    -------
    list of int
        Number of levels of each component, from 1.
    """
    # Greedy marginal analysis (Fox 1966; Shoham and Gersho 1988): min sum D_i(b_i) subject to sum b_i <= B has equal
    # slopes D_i' = -lambda at the optimum, and with convex curves taking the steepest increments first lowers lambda
    # until B is spent. Mixed radix rounds words up, so the budget of log2 levels is searched until the bytes fit.
    n_components, steps = len(distortions), _all_steps(distortions)
    most_bytes = int(n_components * bits / 8 + 1e-9)
    budgets = [8.0 * most_bytes - _BUDGET_STEP * n for n in range(1 + int(8 * most_bytes / _BUDGET_STEP))]

    def taken(budget: float) -> Int64[np.ndarray, " components"]:
        return take_steps(steps.component, steps.bits, steps.levels, n_components, budget)

    # Budgets descend and bytes with them: bisect for the first, largest one whose levels fit.
    chosen = budgets[bisect_left(budgets, True, key=lambda budget: bytes_per_token(taken(budget)) <= most_bytes)]
    found: list[int] = taken(chosen).tolist()
    return found


def gains(distortions: Float64[Tensor, "components counts"]) -> tuple[tuple[float, float], ...]:
    """Rate-distortion curve as (distortion saved per bit, bits) of all increments, in the order of allocation."""
    steps = _all_steps(distortions)
    return tuple(zip((-steps.slope).tolist(), steps.bits.tolist(), strict=True))


def _all_steps(distortions: Float64[Tensor, "components counts"]) -> _Steps:
    rows = np.ascontiguousarray(distortions.numpy())
    hulls, lengths = np.zeros(rows.shape, np.int64), np.zeros(len(rows), np.int64)
    find_hulls(rows, _BITS, hulls, lengths)
    component = np.arange(len(rows)).repeat(lengths - 1)
    inside = np.arange(rows.shape[1] - 1) < lengths[:, None] - 1
    left, right = hulls[:, :-1][inside], hulls[:, 1:][inside]
    bits = _BITS[right] - _BITS[left]
    slope = (rows[component, right] - rows[component, left]) / bits
    order = slope.argsort(kind="stable")  # keeps the order of a component's increments, whose slopes ascend
    return _Steps(slope[order], component[order], bits[order], np.array(LEVEL_COUNTS)[right][order])


@final
class MixedCodebookEstimator(Estimator):
    """Codebooks with bit allocation: a number of levels per channel, and exact k-means codebooks of these sizes.

    The objective is the squared error of x summed over the channels; inside a weighted rotation that is the weighted
    error of the rotated tokens.

    Parameters
    ----------
    bits : float
        Mean bits per channel, 0.25 to 8; counted in whole bytes of a token.
    pooling : float
        Weight of the average histogram relative to that of the channel, for the levels; the allocation uses none.
    """

    method: Literal["mixed_codebook"] = "mixed_codebook"
    bits: float = Field(default=2.5, ge=_LEAST_BITS, le=_MOST_BITS)
    pooling: float = Field(default=0.0, ge=0, le=1)

    @property
    def allowance(self) -> Allowance:
        """Bit allowance in whole bytes of a token."""
        return Allowance(unit_bits=8, least=_LEAST_BITS, most=_MOST_BITS)

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Allocation and levels from the histograms of the channels."""
        ranges = channel_ranges(statistics, 0.0)
        scale_offset = normalisation(ranges, "float32")
        values, _ = normal_values(statistics, ranges, scale_offset, torch.inf, fisher=False)
        centers, weights = rebin(values, len(ranges.low), _BINS)
        p = weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
        distortions = _distortions(centers, p) * scale_offset[0].double().square()[:, None]
        counts = allocate_levels(distortions, self.bits)
        tables = _tables(pooled((centers, weights), self.pooling), counts)
        nearest = torch.stack([table[table.abs().argmin()] for table in tables])
        scale, offset = exact_constants(scale_offset, nearest, ranges)
        n_levels = torch.tensor(counts, dtype=torch.int16)
        quantizer = MixedCodebook(
            channels=len(scale),
            bits=mean_bits(n_levels),
            scale=scale,
            offset=offset,
            n_levels=n_levels,
            levels=torch.cat(tables),
        )
        return Fit(quantizer, ranges.source, trade=lambda: gains(distortions))

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Raises ValueError: levels are fitted."""
        raise InvalidValueError("levels are allocated and fitted; calibrate first")


def _distortions(
    centers: Float64[Tensor, "channels bins"], probabilities: Float64[Tensor, "channels bins"]
) -> Float64[Tensor, "channels counts"]:
    """Least mean squared error of each channel for each of `LEVEL_COUNTS`, in squared half-ranges; 0 for constants."""
    # High-resolution theory (Panter and Dite 1951): D falls as n^-2 for many levels n, here from _EXACT_LEVELS on.
    moving = probabilities.sum(dim=1) > 0
    exact = torch.zeros(len(centers), _EXACT_LEVELS, dtype=torch.float64)
    if moving.any():
        exact[moving] = distortion_by_levels(centers[moving], probabilities[moving], _EXACT_LEVELS)
    columns = [exact[:, n - 1] if n <= _EXACT_LEVELS else exact[:, -1] * (_EXACT_LEVELS / n) ** 2 for n in LEVEL_COUNTS]
    return torch.stack(columns, dim=1)


def _tables(histogram: Histogram, counts: list[int]) -> list[Tensor]:
    """Exact k-means levels of each channel, solved together for all channels with equally many levels."""
    tables: list[Tensor] = [torch.empty(0)] * len(counts)
    for n in sorted(set(counts)):
        chosen = [channel for channel, count in enumerate(counts) if count == n]
        levels = kmeans_1d(histogram[0][chosen], histogram[1][chosen], n).cpu().half()
        for channel, table in zip(chosen, levels, strict=True):
            tables[channel] = table
    return tables
