"""Estimator of Walsh-Hadamard rotation, which needs no data."""

from typing import Literal, final

import torch
from jaxtyping import Int8
from pydantic import Field
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.hadamard import Hadamard
from artifacts.quantizers.identity import Identity
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

_SIGN_SEED = 0


@final
class HadamardEstimator(WrappingEstimator):
    """Walsh-Hadamard transform of each token, which spreads outliers over the channels (arXiv 2404.00456).

    Parameters
    ----------
    heads : int
        Neighbouring heads to transform together, at most all; a block has the largest power of two that divides their
        channels.
    random_signs : bool
        Flip the signs of a fixed random half of the channels first.
    """

    method: Literal["hadamard"] = "hadamard"
    heads: int = Field(default=1, ge=1)
    random_signs: bool = False

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Transform with the inner fit on the transformed reservoir."""
        shape = statistics.shape
        transform = self._around(Identity(channels=shape.channels), shape).transform
        gradients = transform(statistics.row_gradients) if statistics.fisher else None
        mapped = statistics.mapped(transform(statistics.rows), gradients)
        # Entries of H are +-1 / sqrt(n), so the diagonal of H^T diag(w) H is the mean of w over the block.
        if statistics.query_energy is not None:
            width = self._width(shape)
            mapped.query_energy = statistics.query_energy.view(-1, width).mean(dim=1).repeat_interleave(width)
        inner = self.fit_inner(mapped)
        return Fit(self._around(inner.quantizer, shape), inner.source)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Transform around the dynamic inner quantizer."""
        return self._around(self.inner.dynamic(shape), shape)

    def _around(self, inner: Quantizer, shape: SiteShape) -> Hadamard:
        signs = _signs(shape.channels) if self.random_signs else None
        return Hadamard(channels=shape.channels, inner=inner, group_size=self._width(shape), signs=signs)

    def _width(self, shape: SiteShape) -> int:
        heads = min(self.heads, shape.heads)
        width = heads * shape.head_dim
        if shape.heads % heads:
            raise InvalidValueError(f"heads must divide the {shape.heads} heads; got {self.heads}; use 1")
        return width & -width  # the lowest set bit: the largest power of two that divides it


def _signs(channels: int) -> Int8[Tensor, " channels"]:
    """Random signs, half of them -1."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(_SIGN_SEED))
    return torch.where(order < channels // 2, -1, 1).to(torch.int8)
