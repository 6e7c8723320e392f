"""Conditions that the fields of a quantizer must meet, wherever they come from."""

import torch
from torch import Tensor


def check_bits(who: str, bits: int, *, least: int = 1) -> None:
    """Code width within what packing stores.

    Raises
    ------
    ValueError
        If it is not an integer from `least` to 8.
    """
    if type(bits) is not int or not least <= bits <= 8:
        raise ValueError(f"{who}: bits must be an integer from {least} to 8 (16 is the kind 'identity'); got {bits!r}")


def check_vector(who: str, name: str, tensor: Tensor, channels: int, *, positive: bool = False) -> None:
    """One finite float32 number per channel.

    Raises
    ------
    ValueError
        If shape, dtype or values are otherwise.
    """
    if tuple(tensor.shape) != (channels,) or tensor.dtype != torch.float32:
        raise ValueError(
            f"{who}: {name} must be float32 of shape ({channels},); got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    bad = ~torch.isfinite(tensor) | (tensor <= 0 if positive else False)
    if bad.any():
        wanted = "finite and positive" if positive else "finite"
        raise ValueError(f"{who}: {name} must be {wanted}; {int(bad.sum())} of {channels} channels are not")


def check_levels(who: str, levels: Tensor, bits: int, channels: int) -> None:
    """Sorted finite tables of 2^bits levels, one for all channels or one for each.

    Raises
    ------
    ValueError
        If shape, dtype, order or values are otherwise.
    """
    shapes = [(1, 2**bits), (channels, 2**bits)]
    if tuple(levels.shape) not in shapes or levels.dtype != torch.float16:
        raise ValueError(
            f"{who}: levels must be float16 of shape {shapes[0]} or {shapes[1]}; "
            f"got {levels.dtype} of shape {tuple(levels.shape)}"
        )
    wide = levels.float()
    if not torch.isfinite(wide).all() or (wide.diff(dim=1) < 0).any():
        raise ValueError(f"{who}: levels must be finite and in ascending order")


def check_boundaries(who: str, boundaries: Tensor | None, levels: Tensor) -> None:
    """Sorted finite boundaries between the levels of each table.

    Raises
    ------
    ValueError
        If shape, dtype, order or values are otherwise.
    """
    if boundaries is None:
        return
    wanted = (levels.shape[0], levels.shape[1] - 1)
    if tuple(boundaries.shape) != wanted or boundaries.dtype != torch.float32:
        raise ValueError(
            f"{who}: boundaries must be float32 of shape {wanted}; got {boundaries.dtype} of shape "
            f"{tuple(boundaries.shape)}"
        )
    if not torch.isfinite(boundaries).all() or (boundaries.diff(dim=1) < 0).any():
        raise ValueError(f"{who}: boundaries must be finite and in ascending order")
