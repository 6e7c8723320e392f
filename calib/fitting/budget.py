"""A budget of bits for all sites together, spent where it saves most."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.wrapper import AbstractTransform, AbstractWrapper
from artifacts.sites import Site
from calib.estimators import Allowance, Estimator, Fit, RotatedEstimator
from calib.fitting.chain import Chain, Link, Progress
from calib.recipe.errors import RecipeError

_ROUNDING = 1e-6
"""Of a token's bits."""

Proxy = Literal["relative", "fisher"]
"""What is summed over sites: each one's distortion over what its tokens vary by, or the distortion as it is."""

_ROUNDS = 4


def allocate_bits(
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


def fit_budget(
    chain: Chain, estimators: Mapping[Site, Estimator], target_bits: float, progress: Progress = iter
) -> dict[Site, Fit]:
    """Fits sites whose mean number of bits is the target, at one slope of the loss over bits.

    The proxy of the loss is the sum of the distortions that levels are allotted by. Where the metric of every rotation
    is that of the loss (`fisher`), all sites share one slope. Else (`relative`) errors of logits and of values count in
    shares of their variances, which do not compare: keys have one slope and the target for themselves, and so have
    values.

    What a site saves by more bits depends on the bits of those that it is predicted from. So the chain is fitted again
    and again, with equal bits at first and then with those that the fit before asks for, until they stay; of the later
    fits the one with the smallest proxy is taken.

    Parameters
    ----------
    chain : Chain
        The statistics.
    estimators : Mapping[Site, Estimator]
        Of every cached site; each with an allowance.
    target_bits : float
        Mean over all channels of keys and values.
    progress : callable
        Wraps the sites of each fit, for a progress bar.

    Raises
    ------
    RecipeError
        If an estimator takes no bits out of a budget, or not so few or so many.
    """
    allowances = {site: _allowance(site, estimator, target_bits) for site, estimator in estimators.items()}
    proxy: Proxy = "fisher" if all(map(_counts_loss, estimators.values())) else "relative"
    together = [list(estimators)] if proxy == "fisher" else _by_tensor(estimators)
    bits, least = dict.fromkeys(estimators, target_bits), torch.inf
    for number in range(_ROUNDS):
        fits, weights, loss, is_last = dict[Site, Fit](), dict[Site, float](), 0.0, number == _ROUNDS - 1
        for link in chain.links({site: _with_bits(estimators[site], n) for site, n in bits.items()}, progress):
            fits[link.site] = (link.fit if is_last else link.fit.priced()).kept()
            weights[link.site], distortion = _weight_and_distortion(link, proxy)
            loss += weights[link.site] * distortion
        if loss < least or number == 1:
            best, least = fits, loss
        if is_last:
            break
        wanted = dict[Site, float]()
        for sites in together:
            chosen = {site: (fits[site], allowances[site]) for site in sites}
            wanted |= allocate_bits(chosen, weights, target_bits)
        if wanted == bits:
            break
        bits = wanted
    return best


def _allowance(site: Site, estimator: Estimator, target_bits: float) -> Allowance:
    allowance = estimator.allowance
    if allowance is None:
        raise RecipeError(
            f"{site}: target_bits is shared out among sites with method: mixed_codebook or entropy_coded; this one has "
            f"{estimator!r:.80}"
        )
    if not allowance.least <= target_bits <= allowance.most:
        raise RecipeError(
            f"{site}: target_bits must be from {allowance.least:g} to {allowance.most:g} for this method; got "
            f"{target_bits:g}"
        )
    return allowance


def _with_bits(estimator: Estimator, bits: float) -> Estimator:
    """The same estimator, the innermost one with other bits."""
    inner = getattr(estimator, "inner", None)
    changed = {"bits": bits} if inner is None else {"inner": _with_bits(inner, bits)}
    return estimator.model_copy(update=changed)


def _counts_loss(estimator: Estimator) -> bool:
    """Whether the distortion of what it fits is that of the loss."""
    inner = getattr(estimator, "inner", None)
    if isinstance(estimator, RotatedEstimator):
        return estimator.metric == "fisher"
    return isinstance(inner, Estimator) and _counts_loss(inner)


def _by_tensor(sites: Iterable[Site]) -> list[list[Site]]:
    keys = [site for site in sites if site.tensor == "key"]
    return [keys, [site for site in sites if site.tensor == "value"]]


def _weight_and_distortion(link: Link, proxy: Proxy) -> tuple[float, float]:
    """What a site's distortion counts, and its mean over the tokens of the reservoir."""
    z, decoded = (_as_rotated(link.fit.quantizer, rows).double() for rows in (link.rows, link.decoded))
    distortion = float((z - decoded).square().sum(dim=1).mean())
    if proxy == "fisher":
        return 1.0, distortion
    variance = float(z.var(dim=0, correction=0).sum())
    return 1 / variance if variance else 0.0, distortion


def _as_rotated(quantizer: Quantizer, rows: Float32[Tensor, "rows channels"]) -> Float32[Tensor, "rows channels"]:
    """Tokens in the basis, and in the units, in which levels were allotted; predictions left out."""
    while isinstance(quantizer, AbstractWrapper):
        rows = quantizer.transform(rows) if isinstance(quantizer, AbstractTransform) else rows
        quantizer = quantizer.inner
    return rows
