"""Rate-distortion limits of keys and values, from the moments of a text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.sites import Site
from calib.estimators.predicted import NormalEquations
from calib.fitting.chain import Chain
from calib.statistics.moments import Moments
from scripts.bound.rate_distortion import least_distortion

LIMITS = ("head", "layer", "predicted")
"""What is coded together: the channels of a head; those of all heads; those of all heads, given earlier sites."""

_RIDGE = 1e-6
"""Penalty of the predictor relative to the variance of each input: against rounding, and far below what is fitted."""


@dataclass(frozen=True)
class SiteLimits:
    """Limits of a site, on errors as they are weighted there.

    Parameters
    ----------
    metric : Float64[Tensor, "heads head_dim head_dim"]
        G of the squared error e^T G e of each head: that of logits for keys, the identity for values.
    energy : float
        Weighted variance, trace of G C.
    spectra : Mapping[str, Float64[Tensor, "channels"]]
        Weighted eigenvalues for each of `LIMITS`.
    """

    metric: Float64[Tensor, "heads head_dim head_dim"]
    energy: float
    spectra: Mapping[str, Float64[Tensor, " channels"]]

    def decibels(self, limit: str, bits: float) -> float:
        """Least distortion over `energy` at `bits` for each channel, in dB."""
        return 10 * math.log10(least_distortion(self.spectra[limit], bits) / self.energy)


def site_limits(chain: Chain, site: Site) -> SiteLimits:
    """Limits of a site.

    Parameters
    ----------
    chain : Chain
        Statistics of the tier `full`, with the first positions that are left out.
    site : Site
        Keys before RoPE, or values.

    Raises
    ------
    InvalidValueError
        If the vectors of the site are all alike.
    """
    own = chain.site(site)
    metric = own.query_metric
    if metric is None:
        metric = torch.eye(own.shape.head_dim, dtype=torch.float64).expand(own.shape.heads, -1, -1)
    of_layer = torch.block_diag(*metric)[None]
    spectra = {
        "head": weighted_spectrum(_covariance(own.moments), metric),
        "layer": weighted_spectrum(_covariance(own.layer_moments), of_layer),
        "predicted": weighted_spectrum(_remainder(chain, site), of_layer),
    }
    energy = float(spectra["layer"].sum())
    if not energy:
        raise InvalidValueError(f"{site}: expected vectors that differ; got one for all tokens. Use another text")
    return SiteLimits(metric, energy, spectra)


def weighted_spectrum(
    covariance: Float64[Tensor, "groups width width"], metric: Float64[Tensor, "groups width width"]
) -> Float64[Tensor, " channels"]:
    """Eigenvalues of G C, those of all groups together.

    An error e^T G e is the plain squared error of the vector G^(1/2) x, whose covariance G^(1/2) C G^(1/2) has the same
    eigenvalues.
    """
    # With C = F F^T they are also those of F^T G F, which is symmetric and takes no root of a singular G.
    values, vectors = torch.linalg.eigh(covariance)
    factor = vectors * values.clamp_min(0).sqrt()[:, None, :]
    spectrum: Tensor = torch.linalg.eigvalsh(factor.mT @ metric @ factor).clamp_min(0)
    return spectrum.flatten()


def _covariance(moments: Moments) -> Float64[Tensor, "groups width width"]:
    mean = moments.mean().cpu().view(moments.groups, -1)
    return moments.second().cpu() - mean[:, :, None] * mean[:, None, :]


def _remainder(chain: Chain, site: Site) -> Float64[Tensor, "1 channels channels"]:
    """Covariance of what linear prediction from the layer before, and for values from the key beside, leaves."""
    covariance = _covariance(chain.site(site).layer_moments)
    earlier = [source for source, target in chain.statistics.cross if target == site]
    if not earlier:
        return covariance
    inputs = chain.sources(site, {source: chain.site(source).rows for source in earlier})
    # Cov(x - u A) = C - A^T S_ux - S_ux^T A + A^T S_uu A for any A: a ridge can only make the limit higher.
    weight = NormalEquations(inputs.covariance, inputs.cross_covariance).solve(_RIDGE)
    shared = weight.mT @ inputs.cross_covariance
    return covariance - shared - shared.mT + weight.mT @ inputs.covariance @ weight
