"""Rounding to float16: to nearest, or outwards so that a range still holds every value."""

import torch
from jaxtyping import Float16
from torch import Tensor

from artifacts.coding.finite import expect_finite
from artifacts.errors import NonFiniteError


def nearest_half(x: Tensor, *, who: str) -> Float16[Tensor, "..."]:
    """`x` rounded to the nearest float16.

    Raises
    ------
    NonFiniteError
        If `x` is beyond the range of float16.
    """
    half = x.half()
    expect_finite(
        half,
        x,
        lambda _, largest: NonFiniteError(
            f"{who}: a scale or offset of {largest:.4g} does not fit float16 (largest 65504). "
            "Values this large call for a static per-channel quantizer."
        ),
    )
    return half


def round_outward(x: Tensor, *, up: bool, who: str, positive: bool = False) -> Float16[Tensor, "..."]:
    """`x` rounded up or down to float16; at least the smallest positive number where `positive`.

    Raises
    ------
    NonFiniteError
        If `x` is beyond the range of float16.
    """
    half = nearest_half(x, who=who)
    # Nearest is at most one float16 on the wrong side: step to the neighbour there (directed rounding, IEEE 754).
    off = half.float() < x if up else half.float() > x
    half = torch.where(off, _neighbour(half, up=up), half)
    if positive:
        half = half.clamp_min(torch.finfo(torch.float16).smallest_normal / 1024)
    return nearest_half(half, who=who)


def _neighbour(half: Float16[Tensor, "..."], *, up: bool) -> Float16[Tensor, "..."]:
    """Next float16 above or below; `torch.nextafter` has no float16 kernel on CUDA."""
    # IEEE 754 numbers of one sign are ordered as their bit patterns, so the neighbour away from zero is pattern + 1.
    bits = (half + 0.0).view(torch.int16).int()  # + 0.0 makes -0.0 a positive zero
    away_from_zero = (half >= 0) if up else (half <= 0)
    stepped = torch.where(away_from_zero, bits + 1, bits - 1)
    if not up:
        stepped = torch.where(half == 0, 1 - 2**15, stepped)  # the smallest negative number
    return stepped.to(torch.int16).view(torch.float16)
