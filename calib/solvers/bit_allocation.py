"""Levels for many components under one budget of bits, along the convex hull of distortion over bits."""

import math
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from torch import Tensor

from calib.solvers.bit_allocation_kernel import bytes_per_token, find_hulls, take_steps

LEVEL_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Numbers of levels that a component can get."""

_BITS = np.array([math.log2(n) for n in LEVEL_COUNTS])

_BUDGET_STEP = 0.25
"""Bits of a token."""


class _Steps(NamedTuple):
    """From point to point of the components' hulls, in the order in which they are taken.

    Parameters
    ----------
    slope : Float64[ndarray, "steps"]
        Of distortion over bits: negative, and ascending.
    component : Int64[ndarray, "steps"]
        Whose step it is.
    bits : Float64[ndarray, "steps"]
        What it costs.
    levels : Int64[ndarray, "steps"]
        What the component has after it.
    """

    slope: Float64[np.ndarray, " steps"]
    component: Int64[np.ndarray, " steps"]
    bits: Float64[np.ndarray, " steps"]
    levels: Int64[np.ndarray, " steps"]


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

    def taken(budget: float) -> Int64[np.ndarray, " components"]:
        return take_steps(steps.component, steps.bits, steps.levels, n_components, budget)

    chosen = budgets[bisect_left(budgets, True, key=lambda budget: bytes_per_token(taken(budget)) <= most_bytes)]
    found: list[int] = taken(chosen).tolist()
    return found


def gains(distortions: Float64[Tensor, "components counts"]) -> tuple[tuple[float, float], ...]:
    """(distortion saved per bit, bits) of all steps that `allot` chooses from, in its order."""
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
    order = slope.argsort(kind="stable")  # a component's own steps ascend
    return _Steps(slope[order], component[order], bits[order], np.array(LEVEL_COUNTS)[right][order])
