"""A budget of bits shared out among sites, so that the last one saves as much anywhere."""

from collections.abc import Mapping

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from artifacts.sites import Site
from calib.estimators import Allowance, Fit

_ROUNDING = 1e-6
"""Of a token's bits."""


def share_out(
    chosen: Mapping[Site, tuple[Fit, Allowance]], weights: Mapping[Site, float], target_bits: float
) -> dict[Site, float]:
    """Bits of each site so that their mean is the target and the last step anywhere saves as much per bit.

    Parameters
    ----------
    chosen : Mapping[Site, tuple[Fit, Allowance]]
        Fits with their steps, and what each site can be given.
    weights : Mapping[Site, float]
        Of each site's distortion.
    target_bits : float
        Mean over all channels.
    """
    sites = list(chosen)
    channels = torch.tensor([fit.quantizer.channels for fit, _ in chosen.values()])
    steps = [torch.tensor(fit.steps, dtype=torch.float64).reshape(-1, 2) for fit, _ in chosen.values()]
    gains = torch.cat([weights[site] * own[:, 0] for site, own in zip(sites, steps, strict=True)])
    owner = torch.arange(len(sites)).repeat_interleave(torch.tensor([len(own) for own in steps]))
    order = gains.argsort(descending=True, stable=True)
    spent = torch.cat(steps)[order, 1].cumsum(0)
    taken = order[spent <= target_bits * float(channels.sum())]
    wanted = torch.zeros(len(sites), dtype=torch.float64).index_add_(0, owner[taken], torch.cat(steps)[taken, 1])
    given = _whole_units(wanted, channels, [allowance for _, allowance in chosen.values()], target_bits)
    return {site: float(n) / int(width) for site, n, width in zip(sites, given, channels, strict=True)}


def _whole_units(
    wanted: Float64[Tensor, " sites"],
    channels: Int64[Tensor, " sites"],
    allowances: list[Allowance],
    target_bits: float,
) -> Float64[Tensor, " sites"]:
    """Bits of a token in whole units and within the limits, near `wanted`, whose sum is the target."""
    unit = torch.tensor([allowance.unit_bits for allowance in allowances], dtype=torch.float64)
    least = (torch.tensor([allowance.least for allowance in allowances]) * channels / unit).ceil()
    most = (torch.tensor([allowance.most for allowance in allowances]) * channels / unit).floor()
    given = (wanted / unit).round().clamp(least, most)
    while True:
        missing = target_bits * float(channels.sum()) - float((given * unit).sum()) + _ROUNDING
        step = 1 if missing > 0 else -1
        possible = ((given + step >= least) & (given + step <= most)) & (unit <= missing if step > 0 else unit > 0)
        if not possible.any():
            return given * unit
        given[(step * (wanted / unit - given)).masked_fill(~possible, -torch.inf).argmax()] += step
