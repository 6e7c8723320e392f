"""Levels for many components under one budget of bits, along the convex hull of distortion over bits."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence

from jaxtyping import Float64
from torch import Tensor

from artifacts.mixed_radix import bytes_per_token

LEVEL_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Numbers of levels that a component can get."""

_BUDGET_STEP = 0.25
"""Bits of a token."""


def allot(distortions: Float64[Tensor, "components counts"], bits: float) -> list[int]:
    """A number of levels for each component, so that the sum of distortions is small and the bytes are within budget.

    Distortion is not convex in log2 of the number of levels, so steps lead from each component's hull point to its
    next; the steps of all components are taken from the steepest on. Where the next does not fit, later and smaller
    ones of other components still may.

    Parameters
    ----------
    distortions : Float64[Tensor, "components counts"]
        Of each component with each number of levels in `LEVEL_COUNTS`.
    bits : float
        Mean bits per component; the bytes of a whole token, in mixed radix, take no more.

    Returns
    -------
    list of int
        Numbers of levels, some of them 1.
    """
    n_components, steps = len(distortions), _all_steps(distortions)
    most_bytes = int(n_components * bits / 8 + 1e-9)
    budgets = [8.0 * most_bytes - _BUDGET_STEP * n for n in range(1 + int(8 * most_bytes / _BUDGET_STEP))]

    def fits(budget: float) -> bool:
        return bytes_per_token(_take_steps(steps, n_components, budget)) <= most_bytes

    return _take_steps(steps, n_components, budgets[bisect_left(budgets, True, key=fits)])


def gains(distortions: Float64[Tensor, "components counts"]) -> tuple[tuple[float, float], ...]:
    """(distortion saved per bit, bits) of all steps that `allot` chooses from, in its order."""
    return tuple((-slope, bits) for slope, _, bits, _ in _all_steps(distortions))


def _all_steps(distortions: Float64[Tensor, "components counts"]) -> list[tuple[float, int, float, int]]:
    return sorted(step for c, row in enumerate(distortions.tolist()) for step in _hull_steps(c, row))


def _hull_steps(component: int, distortions: Sequence[float]) -> list[tuple[float, int, float, int]]:
    """(slope, component, bits, levels) from point to point of the lower convex hull; slopes are negative and ascend."""
    bits = [math.log2(n) for n in LEVEL_COUNTS]
    hull = [0]
    for j in range(1, len(bits)):
        if distortions[j] >= distortions[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(bits, distortions, hull[-2], hull[-1]) >= _slope(bits, distortions, hull[-1], j):
            hull.pop()
        hull.append(j)
    return [
        (_slope(bits, distortions, i, j), component, bits[j] - bits[i], LEVEL_COUNTS[j])
        for i, j in itertools.pairwise(hull)
    ]


def _slope(bits: Sequence[float], distortions: Sequence[float], i: int, j: int) -> float:
    return (distortions[j] - distortions[i]) / (bits[j] - bits[i])


def _take_steps(steps: Sequence[tuple[float, int, float, int]], n_components: int, budget: float) -> list[int]:
    counts, stopped = [1] * n_components, [False] * n_components
    for _, component, bits, levels in steps:
        if stopped[component] or bits > budget:
            stopped[component] = True
            continue
        counts[component] = levels
        budget -= bits
    return counts
