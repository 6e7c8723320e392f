"""Reproducible sums: dot products whose value does not depend on the order of summation.

A floating-point matrix product changes in its last bits with the number of rows, the library and the device, so that
the codes of a token would depend on its batch. With factors rounded to a coarse grid float64 holds every partial sum
exactly, in any order.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

_FLOAT64_BITS = 53
_LEAST = 2.0**-100
"""Least row maximum that sets a grid, so that no grid step is subnormal in float32."""


def on_grid(x: Float32[Tensor, "*rows terms"]) -> Float32[Tensor, "*rows terms"]:
    """`x` rounded so that float64 computes dot products of its rows with other rounded rows exactly.

    Each row becomes multiples of a power of two, about 2^-23 of its largest value for 128 terms and 2^-21 for 1024:
    an error of the size of float32 rounding.
    """
    # With |x| <= 2^b steps in both factors a product is at most 2^2b and a sum of n at most 2^(2b + ceil(log2 n)), in
    # units of the two steps: exact in float64 up to 2^53, so b = floor((53 - ceil(log2 n)) / 2). The step is a power of
    # two, as largest = mantissa * 2^e gives 2^(e - b) (pre-rounding: Demmel and Nguyen, ARITH 2013).
    bits = (_FLOAT64_BITS - (x.shape[-1] - 1).bit_length()) // 2
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(_LEAST)
    step = largest * 2.0**-bits / torch.frexp(largest).mantissa
    return (x / step).round() * step


def norm(x: Float32[Tensor, "*rows terms"]) -> Float32[Tensor, "*rows 1"]:
    """Euclidean norm of each row."""
    return on_grid(x).double().square().sum(dim=-1, keepdim=True).sqrt().float()
