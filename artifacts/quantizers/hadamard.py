"""Walsh-Hadamard transform around another quantizer: a fixed rotation that spreads outliers over their block."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float32, Int8
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizers.wrapper import AbstractTransform


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Hadamard(AbstractTransform):
    """Multiplies each block of channels by the orthonormal Hadamard matrix (Sylvester's order) before quantization.

    Parameters
    ----------
    group_size : int
        Channels of a block: a power of two that divides the channels, head_dim for one block a head.
    signs : Int8[Tensor, "channels"] or None
        +1 or -1, by which each channel is multiplied first: the randomised transform. None for all +1.

    References
    ----------
    For keys and values: arXiv 2404.00456, section 4.
    """

    kind: ClassVar[str] = "hadamard"

    group_size: int
    signs: Int8[Tensor, " channels"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = self.channels & -self.channels
        if self.group_size < 1 or largest % self.group_size:
            raise InvalidValueError(
                f"{self.kind}: group_size must be a power of two that divides {self.channels} channels; "
                f"got {self.group_size}. The largest is {largest}"
            )
        self._check_signs()

    @property
    def decode_multiply_adds(self) -> int:
        """Multiply-adds of the wrapped quantizer, plus log2(group_size) a channel for the fast transform."""
        return self.inner.decode_multiply_adds + self.channels * (self.group_size.bit_length() - 1)

    def transform(self, x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """Random signs, then the transform of each block."""
        return hadamard(x if self.signs is None else x * self.signs, self.group_size)

    def invert(self, z: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """The transform of each block, which is its own inverse, then signs."""
        # z = (x * s) H with H symmetric and orthonormal and s = 1 / s, hence x = (z H) * s.
        x = hadamard(z, self.group_size)
        return x if self.signs is None else x * self.signs

    def _check_signs(self) -> None:
        if self.signs is None:
            return
        if tuple(self.signs.shape) != (self.channels,) or self.signs.dtype != torch.int8:
            raise InvalidValueError(
                f"{self.kind}: signs must be int8 of shape ({self.channels},); got {self.signs.dtype} of shape "
                f"{tuple(self.signs.shape)}"
            )
        n_bad = int((self.signs.abs() != 1).sum())
        if n_bad:
            raise InvalidValueError(f"{self.kind}: signs must be +1 or -1; {n_bad} of {self.channels} are not")


def hadamard(x: Float32[Tensor, "tokens channels"], group_size: int) -> Float32[Tensor, "tokens channels"]:
    """Orthonormal Walsh-Hadamard transform of each block of `group_size` channels.

    The fast transform rounds the same for any number of tokens on any device, unlike a matrix product, so that the
    codes of a token do not depend on the batch.
    """
    # H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt 2, H_1 = 1 (Sylvester). Adding and subtracting the halves and interleaving
    # the results, log2(n) times, applies it in n log2(n) operations; one factor 1 / sqrt n at the end makes H H = 1.
    blocks: Tensor = x.unflatten(1, (-1, group_size))
    for _ in range(group_size.bit_length() - 1):
        first, second = blocks.chunk(2, dim=2)
        blocks = torch.stack([first + second, first - second], dim=-1).flatten(2)
    return (blocks * math.sqrt(1 / group_size)).flatten(1)
