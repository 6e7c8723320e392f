"""Tokens in another basis, one for all channels or one for each head."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.coding.exact_sums import on_grid
from artifacts.quantizers.wrapper import AbstractTransform

_LARGEST_CONDITION = 2.0**13
"""From here on rounding z to float32 (2^-24) disturbs x by as much as rounding x to float16 does (2^-11)."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Rotated(AbstractTransform):
    """The wrapped quantizer sees z = x M for each group of channels; x ~ z M^-1.

    M need not be orthogonal: with M = diag(w) U the wrapped quantizer's error is weighted by w as well as rotated.
    The entries that are used are those of `basis` rounded by `on_grid`, and the inverse is that of the rounded ones.

    Parameters
    ----------
    basis : Float32[Tensor, "groups width width"]
        M of each group of `width` neighbouring channels, groups * width = channels: one group for the whole layer,
        or one a head. Finite, and with a condition number |M| |M^-1| / width (Frobenius norms; 1 if orthogonal) of
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
            raise ValueError(
                f"{self.kind}: basis must be float32 of shape (groups, width, width) with groups * width = "
                f"{self.channels}; got {self.basis.dtype} of shape {shape}"
            )
        self._check_condition()

    @property
    def decode_multiply_adds(self) -> int:
        """Those of the wrapped quantizer, and a product with the inverse of M."""
        return self.inner.decode_multiply_adds + self.basis.numel()

    def transform(self, x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """Each group of x times M."""
        return _product(x, self._used)

    def invert(self, z: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """Each group of z times the inverse of M."""
        return _product(z, self._inverse)

    @cached_property
    def _used(self) -> Float32[Tensor, "groups width width"]:
        return on_grid(self.basis.mT).mT

    @cached_property
    def _inverse(self) -> Float32[Tensor, "groups width width"]:
        """Found on the CPU, so that it has the same bits wherever the basis is; not finite where M is singular."""
        inverse = torch.linalg.inv_ex(self._used.cpu().double()).inverse
        return on_grid(inverse.float().mT).mT.to(self.basis.device)

    def _check_condition(self) -> None:
        finite = torch.isfinite(self.basis).all(dim=(1, 2))
        if not finite.all():
            raise ValueError(f"{self.kind}: basis must be finite; that of group {int(finite.int().argmin())} is not")
        sizes = [torch.linalg.matrix_norm(matrix.double()) for matrix in (self._used, self._inverse)]
        condition = (sizes[0] * sizes[1] / self.basis.shape[1]).nan_to_num(torch.inf, posinf=torch.inf)
        if (condition > _LARGEST_CONDITION).any():
            worst = int(condition.argmax())
            raise ValueError(
                f"{self.kind}: basis must have condition numbers of at most {_LARGEST_CONDITION:.0f}; that of group "
                f"{worst} is {float(condition[worst]):.4g}. Raise its smallest weights or singular values."
            )


def _product(
    x: Float32[Tensor, "tokens channels"], matrix: Float32[Tensor, "groups width width"]
) -> Float32[Tensor, "tokens channels"]:
    groups = x.unflatten(1, tuple(matrix.shape[:2])).transpose(0, 1)
    return (on_grid(groups).double() @ matrix.double()).transpose(0, 1).flatten(1).float()
