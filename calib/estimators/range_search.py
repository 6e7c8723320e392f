"""How much of a range is worth its steps: the share of it, around its middle, that leaves the least error."""

from collections.abc import Callable

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.quantizer import Quantizer

RATIOS = torch.linspace(1.0, 0.3, 36)
"""Shares of the range that are tried: steps of 2 %."""


def best_ratios(
    quantizer: Callable[[Float32[Tensor, " channels"]], Quantizer],
    rows: Float32[Tensor, "rows channels"],
    weights: Float32[Tensor, "rows channels"],
    sharing: int,
) -> Float32[Tensor, " channels"]:
    """For every channel the ratio at which the weighted squared error over `rows` is least; of equals the largest.

    Parameters
    ----------
    quantizer : callable
        The quantizer whose ranges are shrunk by a ratio for each channel.
    rows : Float32[Tensor, "rows channels"]
        Tokens to try it on.
    weights : Float32[Tensor, "rows channels"]
        Of their squared errors.
    sharing : int
        Neighbouring channels that have one ratio; divides the channels.
    """
    errors = []
    for ratio in RATIOS:
        decoded = quantizer(ratio.expand(rows.shape[1])).simulate(rows)
        errors.append((weights * (decoded - rows).square()).sum(dim=0, dtype=torch.float64))
    shared = torch.stack(errors).unflatten(1, (-1, sharing)).sum(dim=2)
    return RATIOS[shared.argmin(dim=0)].repeat_interleave(sharing)
