"""Least distortion of a Gaussian vector at a rate."""

import torch
from jaxtyping import Float64
from torch import Tensor

from artifacts.errors import InvalidValueError


def least_distortion(variances: Float64[Tensor, " components"], bits: float) -> float:
    """Least mean squared error of a Gaussian vector, by reverse water-filling over its independent components.

    Parameters
    ----------
    variances : Float64[Tensor, "components"]
        Eigenvalues of the covariance, from 0, in any order.
    bits : float
        Rate in bits, from 0, for each component on average.

    Returns
    -------
    float
        Squared error summed over the components, in units of their variances.

    Raises
    ------
    InvalidValueError
        If the rate or a variance is negative.

    References
    ----------
    Shannon 1959; Cover and Thomas, Elements of Information Theory, 2nd edition, theorem 10.3.3.

    Examples
    --------
    One component of variance 4 at a bit: 4 * 2^-2. At half a bit each, a component below the water level gets nothing.

    >>> least_distortion(torch.tensor([4.0], dtype=torch.float64), 1.0)
    1.0
    >>> least_distortion(torch.tensor([4.0, 0.5], dtype=torch.float64), 0.5)
    1.5
    """
    if bits < 0 or (variances < 0).any():
        raise InvalidValueError(
            f"least_distortion: rate and variances must not be negative; got {bits} bits and a least variance of "
            f"{float(variances.min())}"
        )
    # A component of variance v above the water level w has the error w and the rate log2(v / w) / 2; one below has the
    # error v and no rate. If the k largest are above, their rates add up to n * bits:
    # log2 w_k = (log2 v_1 + ... + log2 v_k - 2 n bits) / k. That v_k >= w_k holds up to the right k and for none behind
    # it: the sum of log2 (v_i / v_k) over i <= k never falls with k, and it must be at most 2 n bits.
    ordered = variances[variances > 0].sort(descending=True).values
    if not len(ordered):
        return 0.0
    number = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    levels = torch.exp2((ordered.log2().cumsum(0) - 2 * len(variances) * bits) / number)
    # The largest component is above its own level at any rate; rounding could deny it at a rate of 0.
    above = max(1, int((ordered >= levels).sum()))
    return float(ordered.clamp_max(levels[above - 1]).sum())
