"""A budget of bits for all sites together, spent where it saves most."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.wrapper import AbstractTransform, AbstractWrapper
from calib.chain import Chain, ChainFit, Progress
from calib.estimators import AllottedEstimator, Estimator, Fit, RotatedEstimator
from calib.recipe_errors import RecipeError

Proxy = Literal["relative", "fisher"]
"""What is summed over sites: each one's distortion over what its tokens vary by, or the distortion as it is."""

_ROUNDS = 4
_LEAST_BITS, _MOST_BITS = 0.25, 8.0


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
        Of every cached site; each allots levels.
    target_bits : float
        Mean over all channels of keys and values, 0.25 to 8, in whole bytes of a token at each site.
    progress : callable
        Wraps the sites of each fit, for a progress bar.

    Raises
    ------
    RecipeError
        If an estimator allots no levels.
    """
    proxy: Proxy = "fisher" if all(map(_counts_loss, estimators.values())) else "relative"
    together = [list(estimators)] if proxy == "fisher" else _by_tensor(estimators)
    bits, least = dict.fromkeys(estimators, target_bits), torch.inf
    for number in range(_ROUNDS):
        fitted = chain.fit({site: _with_bits(site, estimators[site], n) for site, n in bits.items()}, progress)
        found = {site: _weight_and_distortion(chain, fitted, site, proxy) for site in bits}
        weights, loss = {site: w for site, (w, _) in found.items()}, sum(w * d for w, d in found.values())
        if loss < least or number == 1:
            best, least = fitted.fits, loss
        shares = [share_out({site: fitted.fits[site] for site in sites}, weights, target_bits) for sites in together]
        wanted = {site: n for share in shares for site, n in share.items()}
        if wanted == bits:
            break
        bits = wanted
    return best


def share_out(fits: Mapping[Site, Fit], weights: Mapping[Site, float], target_bits: float) -> dict[Site, float]:
    """Bits of each site so that their mean is the target and the last step anywhere saves as much per bit.

    Parameters
    ----------
    fits : Mapping[Site, Fit]
        With the steps that their levels were allotted in.
    weights : Mapping[Site, float]
        Of each site's distortion.
    target_bits : float
        Mean over all channels.
    """
    sites = list(fits)
    channels = torch.tensor([fits[site].quantizer.channels for site in sites])
    steps = [torch.tensor(fits[site].steps, dtype=torch.float64).reshape(-1, 2) for site in sites]
    gains = torch.cat([weights[site] * own[:, 0] for site, own in zip(sites, steps, strict=True)])
    owner = torch.arange(len(sites)).repeat_interleave(torch.tensor([len(own) for own in steps]))
    order = gains.argsort(descending=True, stable=True)
    spent = torch.cat(steps)[order, 1].cumsum(0)
    taken = order[spent <= target_bits * float(channels.sum())]
    wanted = torch.zeros(len(sites), dtype=torch.float64).index_add_(0, owner[taken], torch.cat(steps)[taken, 1])
    n_bytes = _whole_bytes(wanted / 8, channels, int(target_bits * float(channels.sum()) / 8 + 1e-9))
    return {site: 8 * int(n) / int(width) for site, n, width in zip(sites, n_bytes, channels, strict=True)}


def _whole_bytes(wanted: Tensor, channels: Tensor, total: int) -> Tensor:
    """Whole numbers within the limits, near `wanted`, whose sum is the total."""
    least, most = (channels * _LEAST_BITS / 8).ceil().long(), (channels * _MOST_BITS / 8).floor().long()
    n_bytes = wanted.round().long().clamp(least, most)
    while (missing := total - int(n_bytes.sum())) != 0:
        step = 1 if missing > 0 else -1
        urgency = (step * (wanted - n_bytes)).masked_fill(
            (n_bytes + step < least) | (n_bytes + step > most), -torch.inf
        )
        chosen = urgency.argsort(descending=True, stable=True)[: abs(missing)]
        chosen = chosen[urgency[chosen] > -torch.inf]
        if not len(chosen):
            break
        n_bytes[chosen] += step
    return n_bytes


def _with_bits(site: Site, estimator: Estimator, bits: float) -> Estimator:
    """The same estimator, its levels allotted with other bits."""
    if isinstance(estimator, AllottedEstimator):
        return estimator.model_copy(update={"bits": bits})
    inner = getattr(estimator, "inner", None)
    if not isinstance(inner, Estimator):
        raise RecipeError(
            f"{site}: target_bits is shared out among sites with method: allotted; this one has {estimator!r:.80}"
        )
    return estimator.model_copy(update={"inner": _with_bits(site, inner, bits)})


def _counts_loss(estimator: Estimator) -> bool:
    """Whether the distortion of what it fits is that of the loss."""
    inner = getattr(estimator, "inner", None)
    if isinstance(estimator, RotatedEstimator):
        return estimator.metric == "fisher"
    return isinstance(inner, Estimator) and _counts_loss(inner)


def _by_tensor(sites: Iterable[Site]) -> list[list[Site]]:
    keys = [site for site in sites if site.tensor == "key"]
    return [keys, [site for site in sites if site.tensor == "value"]]


def _weight_and_distortion(chain: Chain, fitted: ChainFit, site: Site, proxy: Proxy) -> tuple[float, float]:
    """What a site's distortion counts, and its mean over the tokens of the reservoir."""
    quantizer = fitted.fits[site].quantizer
    z, decoded = (_as_rotated(quantizer, rows).double() for rows in (chain.site(site).rows, fitted.decoded[site]))
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
