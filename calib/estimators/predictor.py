"""Linear predictors that hold for tokens which they were not fitted to."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from calib.statistics.sources import Sources

_SHARES = (0.0, 0.3, 1.0)
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""What shrinkage is chosen from: coarsely, for it is one choice for a whole site."""

_CONSTANT = 1e-12
"""Of the largest variance: below it an input is one that never changes."""

_JUDGED_CHANNELS = 128
"""Channels of a wide site by which a predictor is judged: shrinkage is one choice for all of them."""


@dataclass(frozen=True)
class NormalEquations:
    """Covariances that a least-squares predictor is the solution of.

    Parameters
    ----------
    inputs : Float64[Tensor, "inputs inputs"]
        Of the inputs.
    cross : Float64[Tensor, "inputs channels"]
        Between inputs and targets.
    """

    inputs: Float64[Tensor, "inputs inputs"]
    cross: Float64[Tensor, "inputs channels"]

    def mixed(self, other: "NormalEquations", share: float) -> "NormalEquations":
        """With a share of the other ones in them."""
        return NormalEquations(torch.lerp(self.inputs, other.inputs, share), torch.lerp(self.cross, other.cross, share))

    def solve(self, ridge: float) -> Float64[Tensor, "inputs channels"]:
        """The predictor, with a share of each input's variance added to it; inputs that never change count nothing."""
        variance = self.inputs.diagonal()
        scale = torch.where(variance > _CONSTANT * variance.max(), variance, torch.inf).rsqrt()
        scaled = scale[:, None] * self.inputs * scale
        scaled.diagonal().add_(ridge)
        solution: Tensor = torch.cholesky_solve(scale[:, None] * self.cross, torch.linalg.cholesky(scaled))
        return scale[:, None] * solution

    @classmethod
    def of(cls, u: Float64[Tensor, "rows inputs"], x: Float64[Tensor, "rows channels"]) -> "NormalEquations":
        """Of centred tokens."""
        return cls(u.mT @ u / len(u), u.mT @ x / len(u))


def fit_predictor(
    sources: Sources, x: Float32[Tensor, "rows channels"], weights: Float64[Tensor, " channels"]
) -> Float64[Tensor, "inputs channels"]:
    """A of x ~ u A + bias with the decoded inputs u: least squares on the reservoir, shrunk as held-out tokens say.

    It is drawn towards the predictor of all tokens before quantization by a share of their covariances in the normal
    equations, and towards zero by a ridge. Both are those that predict one half of the reservoir best from the other
    half; A is zero where none does it better than the mean.

    Parameters
    ----------
    sources : Sources
        The inputs.
    x : Float32[Tensor, "rows channels"]
        The site's own tokens of the reservoir.
    weights : Float64[Tensor, "channels"]
        Of a squared error in each channel.
    """
    chosen = shrinkage(sources, x, weights)
    if chosen is None:
        return torch.zeros_like(sources.cross_covariance)
    share, ridge = chosen
    sampled = NormalEquations.of(_centred(sources.decoded), _centred(x))
    return sampled.mixed(NormalEquations(sources.covariance, sources.cross_covariance), share).solve(ridge)


def shrinkage(
    sources: Sources, x: Float32[Tensor, "rows channels"], weights: Float64[Tensor, " channels"]
) -> tuple[float, float] | None:
    """Share and ridge that predict the second half of the reservoir best from the first, whose order is random."""
    half, stride = len(x) // 2, -(-x.shape[1] // _JUDGED_CHANNELS)
    if half < 2:
        return None
    u, x, weights = sources.decoded.double(), x[:, ::stride].double(), weights[::stride]
    first, others = NormalEquations.of(_centred(u[:half]), _centred(x[:half])), _without(sources, x, half, stride)
    u, wanted = u[half:] - u[:half].mean(dim=0), x[half:] - x[:half].mean(dim=0)
    errors: dict[tuple[float, float] | None, float] = {None: _error(wanted, weights)}
    for share in _SHARES:
        mixed = first.mixed(others, share)
        errors |= {(share, ridge): _error(wanted - u @ mixed.solve(ridge), weights) for ridge in _RIDGES}
    return min(errors, key=lambda choice: errors[choice])


def _without(sources: Sources, x: Float64[Tensor, "rows channels"], half: int, stride: int) -> NormalEquations:
    """Of all exact tokens but those that judge: seen before, they would speak for what saw them."""
    u, target = sources.exact[half:].double() - sources.mean, x[half:] - sources.target_mean[::stride]
    n_left = max(1, sources.n_tokens - len(u))
    inputs = sources.n_tokens * sources.covariance - u.mT @ u
    cross = sources.n_tokens * sources.cross_covariance[:, ::stride] - u.mT @ target
    return NormalEquations(inputs / n_left, cross / n_left)


def _centred(rows: Tensor) -> Float64[Tensor, "rows _"]:
    return rows.double() - rows.double().mean(dim=0)


def _error(difference: Float64[Tensor, "rows channels"], weights: Float64[Tensor, " channels"]) -> float:
    return float((difference.square() @ weights).mean())
