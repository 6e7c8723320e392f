"""What a site can be predicted from."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from artifacts.sites import Site


class Shrinkage(NamedTuple):
    """How far a predictor is drawn away from the least squares of the reservoir.

    Parameters
    ----------
    share : float
        Of the covariances of all tokens before quantization in the normal equations.
    ridge : float
        Added to the variance of each input, in units of it; with infinity nothing is predicted.
    """

    share: float
    ridge: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Earlier sites of the same tokens, their channels one after the other: "inputs".

    Parameters
    ----------
    sites : tuple of Site
        In the order of the inputs.
    widths : tuple of int
        Channels of each.
    decoded : Float32[Tensor, "rows inputs"]
        The tokens of the reservoir as their quantizers give them back.
    exact : Float32[Tensor, "rows inputs"]
        The same tokens before.
    n_tokens : int
        Tokens that the moments are of.
    mean : Float64[Tensor, "inputs"]
        Of the exact inputs, over all tokens.
    target_mean : Float64[Tensor, "channels"]
        Of the site itself, over all tokens.
    covariance : Float64[Tensor, "inputs inputs"]
        Of the exact inputs, over all tokens.
    cross_covariance : Float64[Tensor, "inputs channels"]
        Between the exact inputs and the site, over all tokens.
    shrinkage : Shrinkage or None
        Of the predictor, where a fit with other numbers of bits has chosen it; None where it is to be chosen.
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
        """The decoded vectors of each site, as a quantizer takes them."""
        return torch.split(self.decoded, list(self.widths), dim=1)
