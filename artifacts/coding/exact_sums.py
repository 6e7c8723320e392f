"""Sums whose value does not depend on the order of their terms.

A matrix product in floating point changes its last bits with the number of rows, the library and the device: a token
would get other codes alone than among others. Factors on a coarse enough grid of powers of two have none of that,
because float64 then holds every partial sum without rounding.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

_FLOAT64_BITS = 53
_LEAST = 2.0**-100
"""Rows below it are rounded as if they reached it, so that no step is subnormal in float32."""


def on_grid(x: Float32[Tensor, "*rows terms"]) -> Float32[Tensor, "*rows terms"]:
    """`x` rounded so that float64 adds up the products of one of its rows with another rounded row exactly.

    Each row becomes multiples of a power of two, about 2^-23 of its largest value for 128 terms and 2^-21 for 1024:
    the error is of the size that a product in float32 has.
    """
    bits = (_FLOAT64_BITS - (x.shape[-1] - 1).bit_length()) // 2
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(_LEAST)
    step = largest * 2.0**-bits / torch.frexp(largest).mantissa
    return (x / step).round() * step


def norm(x: Float32[Tensor, "*rows terms"]) -> Float32[Tensor, "*rows 1"]:
    """Euclidean norm of each row."""
    return on_grid(x).double().square().sum(dim=-1, keepdim=True).sqrt().float()
