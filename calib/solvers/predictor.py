"""Linear predictors that hold for tokens which they were not fitted to."""

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from calib.statistics.sources import Shrinkage, Sources

_SHARES = (0.0, 0.3, 1.0)
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""What shrinkage is chosen from: coarsely, for it is one choice for a whole site."""

_CONSTANT = 1e-12
"""Of the largest variance: below it an input is one that never changes."""

_JUDGED_CHANNELS = 128
"""Channels of a wide site by which a predictor is judged: shrinkage is one choice for all of them."""


NOTHING = Shrinkage(0.0, inf)


@dataclass(frozen=True)
class NormalEquations:
    """Covariances that a least-squares predictor is the solution of.

    Parameters
    ----------
    inputs : Float[Tensor, "inputs inputs"]
        Of the inputs.
    cross : Float[Tensor, "inputs channels"]
        Between inputs and targets.
    """

    inputs: Float[Tensor, "inputs inputs"]
    cross: Float[Tensor, "inputs channels"]

    def mixed(self, other: "NormalEquations", share: float) -> "NormalEquations":
        """With a share of the other ones in them."""
        return NormalEquations(torch.lerp(self.inputs, other.inputs, share), torch.lerp(self.cross, other.cross, share))

    def single(self) -> "NormalEquations":
        """In float32, which takes half the time."""
        return NormalEquations(self.inputs.float(), self.cross.float())

    def solve(self, ridge: float) -> Float[Tensor, "inputs channels"]:
        """The predictor, with a share of each input's variance added to it; inputs that never change count nothing.

        Nothing is predicted from covariances that are rounding alone, as those of one token repeated are.
        """
        variance = self.inputs.diagonal()
        scale = torch.where(variance > _CONSTANT * variance.max(), variance, torch.inf).rsqrt()
        scaled = scale[:, None] * self.inputs * scale
        scaled.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if failed:
            return torch.zeros_like(self.cross)
        return scale[:, None] * torch.cholesky_solve(scale[:, None] * self.cross, factor)

    @classmethod
    def of(cls, u: Float[Tensor, "rows inputs"], x: Float[Tensor, "rows channels"]) -> "NormalEquations":
        """Of centred tokens."""
        return cls(u.mT @ u / len(u), u.mT @ x / len(u))


def fit_predictor(
    sources: Sources, x: Float32[Tensor, "rows channels"], shrinkage: Shrinkage
) -> Float64[Tensor, "inputs channels"]:
    """A of x ~ u A + bias with the decoded inputs u: least squares on the reservoir, shrunk.

    Parameters
    ----------
    sources : Sources
        The inputs.
    x : Float32[Tensor, "rows channels"]
        The site's own tokens of the reservoir.
    shrinkage : Shrinkage
        Towards the predictor of all tokens before quantization, and towards zero.
    """
    if shrinkage == NOTHING:
        return torch.zeros_like(sources.cross_covariance)
    sampled = NormalEquations.of(_centred(sources.decoded.double()), _centred(x.double()))
    exact = NormalEquations(sources.covariance, sources.cross_covariance)
    return sampled.mixed(exact, shrinkage.share).solve(shrinkage.ridge)


def held_out_shrinkage(
    sources: Sources, x: Float32[Tensor, "rows channels"], weights: Float64[Tensor, " channels"]
) -> Shrinkage:
    """The one that predicts the second half of the reservoir, whose order is random, best from the first.

    Nothing is predicted where no predictor does it better than the mean.

    Parameters
    ----------
    sources : Sources
        The inputs.
    x : Float32[Tensor, "rows channels"]
        The site's own tokens of the reservoir.
    weights : Float64[Tensor, "channels"]
        Of a squared error in each channel.
    """
    half, stride = len(x) // 2, -(-x.shape[1] // _JUDGED_CHANNELS)
    if half < 2:
        return NOTHING
    u, x, weights = sources.decoded, x[:, ::stride], weights[::stride]
    first = NormalEquations.of(_centred(u[:half]), _centred(x[:half]))
    others = _without(sources, x, half, stride).single()
    u, wanted = u[half:] - u[:half].mean(dim=0), x[half:] - x[:half].mean(dim=0)
    errors = {NOTHING: _error(wanted, weights)}
    for share in _SHARES:
        mixed = first.mixed(others, share)
        for ridge in _RIDGES:
            errors[Shrinkage(share, ridge)] = _error(wanted - u @ mixed.solve(ridge), weights)
    return min(errors, key=lambda choice: errors[choice])


def _without(sources: Sources, x: Float32[Tensor, "rows channels"], half: int, stride: int) -> NormalEquations:
    """Of all exact tokens but those that judge: seen before, they would speak for what saw them."""
    u, target = sources.exact[half:] - sources.mean.float(), x[half:] - sources.target_mean[::stride].float()
    n_left = max(1, sources.n_tokens - len(u))
    inputs = sources.n_tokens * sources.covariance - u.mT @ u
    cross = sources.n_tokens * sources.cross_covariance[:, ::stride] - u.mT @ target
    return NormalEquations(inputs / n_left, cross / n_left)


def _centred(rows: Float[Tensor, "rows _"]) -> Float[Tensor, "rows _"]:
    return rows - rows.mean(dim=0)


def _error(difference: Float32[Tensor, "rows channels"], weights: Float64[Tensor, " channels"]) -> float:
    return float((difference.double().square() @ weights).mean())
