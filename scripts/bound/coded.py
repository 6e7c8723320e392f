"""Bits and distortion of fitted quantizers, on tokens that statistics keep."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float32, Float64
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from calib.fitting.chain import Chain
from scripts.bound.limits import SiteLimits


@dataclass(frozen=True)
class Coded:
    """What a quantizer does at a site.

    Parameters
    ----------
    bits : float
        Counted bits of a channel: codes, scales, outliers and exact tokens.
    decibels : float
        Weighted squared error over the weighted variance, in dB.
    """

    bits: float
    decibels: float


def coded(chain: Chain, quantizers: Mapping[Site, Quantizer], limits: Mapping[Site, SiteLimits]) -> dict[Site, Coded]:
    """Bits and distortion of each site, with earlier sites as they are decoded.

    Every site keeps the same sampled tokens, so that predictors read the decoded sources of each token.

    Parameters
    ----------
    chain : Chain
        Statistics of the text to code.
    quantizers : Mapping[Site, Quantizer]
        Of all cached sites.
    limits : Mapping[Site, SiteLimits]
        Metric and energy of each site.

    Raises
    ------
    InvalidValueError
        If scales depend on neighbouring tokens, which a sample does not have, or a site is kept exact.
    """
    found, decoded = dict[Site, Coded](), dict[Site, Tensor]()
    for site, quantizer in sorted(quantizers.items()):
        if not quantizer.is_causal:
            raise InvalidValueError(
                f"{site}: expected scales that come from one token or from calibration; those of {quantizer.kind} come "
                "from neighbouring tokens, and the rows are a sample. Leave the recipe out"
            )
        x, context = chain.site(site).rows, tuple(decoded[source] for source in quantizer.sources)
        codes = quantizer.encode(x, context)
        decoded[site] = quantizer.decode(codes, context)
        error = _mean_error(x, decoded[site], limits[site].metric)
        if not error:
            raise InvalidValueError(f"{site}: it is kept exact and has no distortion to compare. Leave the recipe out")
        found[site] = Coded(8 * codes.nbytes / x.numel(), 10 * math.log10(error / limits[site].energy))
    return found


def _mean_error(
    x: Float32[Tensor, "rows channels"],
    decoded: Float32[Tensor, "rows channels"],
    metric: Float64[Tensor, "heads head_dim head_dim"],
) -> float:
    """Mean over tokens of e^T G e, summed over heads."""
    error = (x.double() - decoded.double()).unflatten(1, (len(metric), -1)).transpose(0, 1)
    return float((error @ metric * error).sum()) / len(x)
