"""The loops of `calib.solvers.bit_allocation`, compiled."""

import numpy as np
from jaxtyping import Float64, Int64

from calib.solvers.compiled import compiled

_WORD_BITS, _TOO_LONG = 56, 2**62
"""Longest word of mixed radix (`artifacts.coding.mixed_radix`), and more bits than any token has."""


@compiled
def find_hulls(
    distortions: Float64[np.ndarray, "components counts"],
    bits: Float64[np.ndarray, " counts"],
    hulls: Int64[np.ndarray, "components counts"],
    lengths: Int64[np.ndarray, " components"],
) -> None:
    """Writes the points of each lower convex hull, from the first on, and how many they are."""
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
    """Numbers of levels after all steps that fit, each component's until the first that does not."""
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
    """As `artifacts.coding.mixed_radix.bytes_per_token`."""
    coded = n_levels[n_levels > 1]
    bits = np.zeros(len(coded) + 1, np.int64)  # from each digit on
    for start in range(len(coded) - 1, -1, -1):
        product, width, least = 1, 0, _TOO_LONG
        for stop in range(start, len(coded)):
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
