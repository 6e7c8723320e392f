"""Inputs of a linear predictor: earlier sites and their moments with the predicted site."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from artifacts.sites import Site


class Shrinkage(NamedTuple):
    """Regularisation of a predictor.

    Parameters
    ----------
    moment_weight : float
        Weight, from 0 to 1, of the covariances of all tokens before quantization in the normal equations; the rest is
        that of the dequantized reservoir.
    ridge : float
        Ridge penalty, relative to the variance of each input; with infinity the prediction is zero.
    """

    moment_weight: float
    ridge: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Earlier sites of the same tokens, with their channels concatenated as "inputs".

    Parameters
    ----------
    sites : tuple of Site
        Sites in the order of the inputs.
    widths : tuple of int
        Channels of each site.
    decoded : Float32[Tensor, "rows inputs"]
        Tokens of the reservoir, dequantized.
    exact : Float32[Tensor, "rows inputs"]
        The same tokens in full precision.
    n_tokens : int
        Number of tokens behind the moments.
    mean : Float64[Tensor, "inputs"]
        Mean of the full-precision inputs, over all tokens.
    target_mean : Float64[Tensor, "channels"]
        Mean of the predicted site, over all tokens.
    covariance : Float64[Tensor, "inputs inputs"]
        Covariance of the full-precision inputs, over all tokens.
    cross_covariance : Float64[Tensor, "inputs channels"]
        Covariance of the full-precision inputs with the predicted site, over all tokens.
    shrinkage : Shrinkage or None
        Regularisation chosen in a fit with other bits; None to choose it.
    """

    sites: tuple[Site, ...]
    widths: tuple[int, ...]
    decoded: Float32[Tensor, "rows inputs"]
    exact: Float32[Tensor, "rows inputs"]
    n_tokens: int
    mean: Float64[Tensor, " inputs"]
    target_mean: Float64[Tensor, " channels"]
    covariance: Float64[Tensor, "inputs inputs"]
    cross_covariance: Float64[Tensor, "inputs channels"]
    shrinkage: Shrinkage | None = None

    @property
    def context(self) -> tuple[Tensor, ...]:
        """Dequantized vectors of each site: the context of a quantizer."""
        return torch.split(self.decoded, list(self.widths), dim=1)
