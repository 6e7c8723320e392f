"""Bit allocation over all sites for a common budget."""

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
"""Tolerance, in bits of a token."""

Proxy = Literal["relative", "fisher"]
"""Proxy of the loss: the sum over sites of distortion / variance, or of distortion in units of the loss."""

_ROUNDS = 4
"""Fits of the chain, at most."""


def allocate_bits(
    chosen: Mapping[Site, tuple[Fit, Allowance]], weights: Mapping[Site, float], target_bits: float
) -> dict[Site, float]:
    """Bits of each site with the target as their mean, at equal slopes of the weighted distortion.

    Parameters
    ----------
    chosen : Mapping[Site, tuple[Fit, Allowance]]
        Fits with their rate-distortion curves, and the bits that each site may have.
    weights : Mapping[Site, float]
        Weight of the distortion of each site.
    target_bits : float
        Mean over all channels.
    """
    # Lagrangian: min sum_i w_i D_i(b_i) + lambda sum_i b_i has -w_i D_i'(b_i) = lambda at every site (Shoham and Gersho
    # 1988; reverse water-filling for Gaussians). Convex curves reach it by taking increments of all sites in the order
    # of their gain per bit until the budget is spent; the last gain taken is lambda.
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
    """Bits per token in whole units and within the limits, near `wanted`, with the target as their sum."""
    # Round each to its unit, then move single units where the remainder is largest (largest-remainder method).
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
    """Fits of all sites with the target as their mean bits, at equal slopes of a proxy of the loss.

    The proxy is the sum of the distortions that the bit allocation minimises. If the metric of every rotation is that
    of the loss (`fisher`), all sites have one slope. Otherwise (`relative`) errors of logits and of values are taken
    relative to their variances, which do not compare: keys have one slope and their own target, and so have values.

    The rate-distortion curve of a site depends on the bits of its predictors. So the chain is fitted repeatedly, first
    with equal bits and then with the allocation of the fit before, until that no longer changes; of the later fits the
    one with the smallest proxy is returned.

    Parameters
    ----------
    chain : Chain
        Statistics, with fits in the order of prediction.
    estimators : Mapping[Site, Estimator]
        Estimator of every cached site; each with an allowance.
    target_bits : float
        Mean over all channels of keys and values.
    progress : callable
        Wraps the sites of each fit, for a progress bar.

    Raises
    ------
    RecipeError
        If a method has no bit allocation, or the target is outside its limits.
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
        # Round 0 has equal bits and serves to measure curves only, so that round 1 always replaces it.
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


def at_equal_bits(estimators: Mapping[Site, Estimator], target_bits: float) -> dict[Site, Estimator]:
    """Estimators with the target as the bits of every site; errors are those of `fit_budget`."""
    for site, estimator in estimators.items():
        _allowance(site, estimator, target_bits)
    return {site: _with_bits(estimator, target_bits) for site, estimator in estimators.items()}


def _allowance(site: Site, estimator: Estimator, target_bits: float) -> Allowance:
    allowance = estimator.allowance
    if allowance is None:
        raise RecipeError(
            f"{site}: target_bits allocates bits to sites with method: mixed_codebook or entropy_coded; got "
            f"{estimator!r:.80}"
        )
    if not allowance.least <= target_bits <= allowance.most:
        raise RecipeError(
            f"{site}: target_bits must be from {allowance.least:g} to {allowance.most:g} for this method; got "
            f"{target_bits:g}"
        )
    return allowance


def _with_bits(estimator: Estimator, bits: float) -> Estimator:
    """The same estimator with other bits in the innermost one."""
    inner = getattr(estimator, "inner", None)
    changed = {"bits": bits} if inner is None else {"inner": _with_bits(inner, bits)}
    return estimator.model_copy(update=changed)


def _counts_loss(estimator: Estimator) -> bool:
    """True if the distortion of the quantizer is in units of the loss: inside a rotation with the Fisher metric."""
    inner = getattr(estimator, "inner", None)
    if isinstance(estimator, RotatedEstimator):
        return estimator.metric == "fisher"
    return isinstance(inner, Estimator) and _counts_loss(inner)


def _by_tensor(sites: Iterable[Site]) -> list[list[Site]]:
    keys = [site for site in sites if site.tensor == "key"]
    return [keys, [site for site in sites if site.tensor == "value"]]


def _weight_and_distortion(link: Link, proxy: Proxy) -> tuple[float, float]:
    """Weight of the distortion of a site, and the mean distortion over the reservoir."""
    z, decoded = (_as_rotated(link.fit.quantizer, rows).double() for rows in (link.rows, link.decoded))
    distortion = float((z - decoded).square().sum(dim=1).mean())
    if proxy == "fisher":
        return 1.0, distortion
    # Relative distortion has no units, so that sites whose errors are of logits of different scales can be added.
    variance = float(z.var(dim=0, correction=0).sum())
    return 1 / variance if variance else 0.0, distortion


def _as_rotated(quantizer: Quantizer, rows: Float32[Tensor, "rows channels"]) -> Float32[Tensor, "rows channels"]:
    """Tokens in the basis and units of the bit allocation; predictions, which cancel in differences, are left out."""
    while isinstance(quantizer, AbstractWrapper):
        rows = quantizer.transform(rows) if isinstance(quantizer, AbstractTransform) else rows
        quantizer = quantizer.inner
    return rows
