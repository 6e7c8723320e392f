"""Change of basis around another quantizer: one matrix for all channels or one per head."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.coding.exact_sums import on_grid
from artifacts.errors import InvalidValueError
from artifacts.quantizers.wrapper import AbstractTransform

_LARGEST_CONDITION = 2.0**13
"""Largest condition number: at 2^13, rounding z to float32 (2^-24) disturbs x as much as float16 does (2^-11)."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Rotated(AbstractTransform):
    """Quantizes z = x M for each group of channels and decodes to z M^-1.

    M need not be orthogonal: M = diag(w) U, with U orthogonal, weights the error of channel c by w_c as well as
    rotating it. `basis` is rounded by `on_grid` before use, and the inverse is that of the rounded matrix.

    Parameters
    ----------
    basis : Float32[Tensor, "groups width width"]
        M of each group of `width` neighbouring channels, groups * width = channels: one group for the whole layer,
        or one per head. Finite, and with a condition number |M| |M^-1| / width (Frobenius norms; 1 if orthogonal) of
        at most 8192, the factor by which M^-1 can raise the relative rounding error of z.

    References
    ----------
    Per-token quantization in a rotated basis: arXiv 2404.00456, section 4; a basis from second moments of keys and
    queries: arXiv 2605.17757.
    """

    kind: ClassVar[str] = "rotated"

    basis: Float32[Tensor, "groups width width"]

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = tuple(self.basis.shape)
        square = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == self.channels
        if not square or self.basis.dtype != torch.float32:
            raise InvalidValueError(
                f"{self.kind}: basis must be float32 of shape (groups, width, width) with groups * width = "
                f"{self.channels}; got {self.basis.dtype} of shape {shape}"
            )
        self._check_condition()

    @property
    def decode_multiply_adds(self) -> int:
        """Multiply-adds of the wrapped quantizer and of the product with the inverse of M."""
        return self.inner.decode_multiply_adds + self.basis.numel()

    def transform(self, x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """Product of each group of x with M."""
        return _product(x, self._used)

    def invert(self, z: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """Product of each group of z with the inverse of M."""
        return _product(z, self._inverse)

    @cached_property
    def _used(self) -> Float32[Tensor, "groups width width"]:
        return on_grid(self.basis.mT).mT

    @cached_property
    def _inverse(self) -> Float32[Tensor, "groups width width"]:
        """Inverse of M, computed on the CPU for the same bits on every device; not finite where M is singular."""
        # With z quantized to z + e, x is off by e M^-1. For M = diag(w) U: |e M^-1 diag(w)|^2 = |e|^2, so the squared
        # error of z is the error of x weighted by w^2 (transform coding: Gersho and Gray, chapter 8).
        inverse = torch.linalg.inv_ex(self._used.cpu().double()).inverse
        return on_grid(inverse.float().mT).mT.to(self.basis.device)

    def _check_condition(self) -> None:
        finite = torch.isfinite(self.basis).all(dim=(1, 2))
        if not finite.all():
            raise InvalidValueError(
                f"{self.kind}: basis must be finite; that of group {int(finite.int().argmin())} is not"
            )
        # Relative error of x is at most |M| |M^-1| times that of z (Golub and Van Loan, chapter 2). The Frobenius
        # product is `width` for an orthogonal M, which the division normalises to 1.
        sizes = [torch.linalg.matrix_norm(matrix.double()) for matrix in (self._used, self._inverse)]
        condition = (sizes[0] * sizes[1] / self.basis.shape[1]).nan_to_num(torch.inf, posinf=torch.inf)
        if (condition > _LARGEST_CONDITION).any():
            worst = int(condition.argmax())
            raise InvalidValueError(
                f"{self.kind}: basis must have condition numbers of at most {_LARGEST_CONDITION:.0f}; that of group "
                f"{worst} is {float(condition[worst]):.4g}. Raise its smallest weights or singular values."
            )


def _product(
    x: Float32[Tensor, "tokens channels"], matrix: Float32[Tensor, "groups width width"]
) -> Float32[Tensor, "tokens channels"]:
    # Products of numbers on the grid are exact in float64, so one rounding to float32 gives the same bits in any batch.
    groups = x.unflatten(1, tuple(matrix.shape[:2])).transpose(0, 1)
    return (on_grid(groups).double() @ matrix.double()).transpose(0, 1).flatten(1).float()
