"""Sensitivity of the model to each site: loss with one layer's keys or values quantized alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.quantizer import Quantizer
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site
from simquant.evaluate import Progress, evaluate_each
from simquant.evaluation.result import EvalResult
from simquant.policy.checks import default_policy
from simquant.policy.policy import CachePolicy
from simquant.protocols.chunking import Chunking
from simquant.protocols.protocol import ProtocolName


@dataclass(frozen=True, kw_only=True)
class SiteLoss:
    """Loss with the keys or the values of one layer quantized alone.

    Parameters
    ----------
    nats, stderr : float
        Mean loss per target and its standard error, clustered by window; a negative loss is noise.
    kl : float
        Mean KL(fp || quantized) in nats, which varies less from window to window than the loss.
    """

    nats: float
    stderr: float
    kl: float


def site_losses(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    policy: CachePolicy | None = None,
    protocol: ProtocolName = "full",
    chunking: Chunking | None = None,
    batch_size: int = 1,
    progress: Progress = iter,
) -> dict[Site, SiteLoss]:
    """Loss of each site quantized alone, to decide which ones get more bits.

    Losses of sites add up to the loss of all only while all are small. Runs the model 1 + n times over each batch, for
    n quantized sites: a few windows are enough.

    Parameters
    ----------
    model, windows, quantizers, policy, protocol, chunking, batch_size, progress
        See `evaluate`.
    """
    # One candidate for each lossy site, with identities everywhere else; all share the full-precision pass.
    exact = {site: Identity(channels=own.channels, site=site) for site, own in quantizers.items()}
    lossy = [site for site, own in quantizers.items() if not isinstance(own, Identity)]
    results = evaluate_each(
        model,
        windows,
        [{**exact, site: quantizers[site]} for site in lossy],
        policy=policy or default_policy(quantizers, sinks_alone=protocol == "full"),
        protocol=protocol,
        chunking=chunking,
        batch_size=batch_size,
        progress=progress,
    )
    found = {site: _loss(result) for site, result in zip(lossy, results, strict=True)}
    return {site: found.get(site, SiteLoss(nats=0.0, stderr=0.0, kl=0.0)) for site in quantizers}


def loss_shares(losses: Mapping[Site, SiteLoss]) -> dict[Site, float]:
    """Share of each site in the sum of the sites' losses, the largest first; negative losses count as zero.

    If losses are infinite or NaN, those sites share the whole.
    """
    # Infinity over infinity is NaN: sites with an infinite or undefined loss get weight 1 and all others 0.
    nats = {site: math.inf if math.isnan(loss.nats) else max(0.0, loss.nats) for site, loss in losses.items()}
    if math.inf in nats.values():
        nats = {site: float(own == math.inf) for site, own in nats.items()}
    total = sum(nats.values())
    shares = {site: own / total if total else 0.0 for site, own in nats.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _loss(result: EvalResult) -> SiteLoss:
    return SiteLoss(nats=result.loss_nats, stderr=result.loss_nats_stderr, kl=result.kl_mean)
