"""What each quantizer costs when all others are left out: which keys or values to give more bits."""

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
    """Of the keys or the values of one layer, quantized alone.

    Parameters
    ----------
    nats, stderr : float
        Mean loss per target and its standard error, clustered by window; negative losses are chance.
    kl : float
        Mean KL(fp || quantized) in nats, which varies less than the loss from window to window.
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
    """What quantizing each site alone loses; the sites' losses add up to that of all only where all are small.

    Runs the model 1 + n times over each batch, n being the sites that are quantized at all: take a few windows.

    Parameters
    ----------
    model, windows, quantizers, policy, protocol, chunking, batch_size, progress
        See `evaluate`.
    """
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
    """Each site's share of the sum of what they lose alone, the largest first; what gains counts as nothing.

    Sites whose loss is infinite or no number share all of it.
    """
    nats = {site: math.inf if math.isnan(loss.nats) else max(0.0, loss.nats) for site, loss in losses.items()}
    if math.inf in nats.values():
        nats = {site: float(own == math.inf) for site, own in nats.items()}
    total = sum(nats.values())
    shares = {site: own / total if total else 0.0 for site, own in nats.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _loss(result: EvalResult) -> SiteLoss:
    return SiteLoss(nats=result.loss_nats, stderr=result.loss_nats_stderr, kl=result.kl_mean)
