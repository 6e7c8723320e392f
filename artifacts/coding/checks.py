"""Validation of quantizer fields, whether fitted or read from a file."""

import torch
from torch import Tensor

from artifacts.errors import InvalidValueError


def check_bits(who: str, bits: int, *, least: int = 1) -> None:
    """Validates a code width.

    Raises
    ------
    ValueError
        If it is not an integer from `least` to 8.
    """
    if type(bits) is not int or not least <= bits <= 8:
        raise InvalidValueError(
            f"{who}: bits must be an integer from {least} to 8 (16 is the kind 'identity'); got {bits!r}"
        )


def check_vector(who: str, name: str, tensor: Tensor, channels: int, *, positive: bool = False) -> None:
    """Validates a float32 vector of one finite number per channel.

    Raises
    ------
    ValueError
        If shape, dtype or values are otherwise.
    """
    if tuple(tensor.shape) != (channels,) or tensor.dtype != torch.float32:
        raise InvalidValueError(
            f"{who}: {name} must be float32 of shape ({channels},); got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    bad = ~torch.isfinite(tensor) | (tensor <= 0 if positive else False)
    if bad.any():
        wanted = "finite and positive" if positive else "finite"
        raise InvalidValueError(f"{who}: {name} must be {wanted}; {int(bad.sum())} of {channels} entries are not")


def check_levels(who: str, levels: Tensor, bits: int, channels: int) -> None:
    """Validates codebooks: sorted, finite, with as many levels as codes of `bits` bits need.

    Raises
    ------
    ValueError
        If shape, dtype, order or values are otherwise.
    """
    # At most 2^(bits-1) levels would fit codes of one bit less: such a table has the wrong code width.
    n_tables, n_levels = levels.shape if levels.ndim == 2 else (0, 0)
    if channels % max(1, n_tables) or not 2 ** (bits - 1) < n_levels <= 2**bits or levels.dtype != torch.float16:
        raise InvalidValueError(
            f"{who}: levels must be float16, more than {2 ** (bits - 1)} and at most {2**bits} of them in each table, "
            f"and the number of tables must divide {channels}; got {levels.dtype} of shape {tuple(levels.shape)}"
        )
    wide = levels.float()
    if not torch.isfinite(wide).all() or (wide.diff(dim=1) < 0).any():
        raise InvalidValueError(f"{who}: levels must be finite and in ascending order; {_disorder(wide)}")


def check_boundaries(who: str, boundaries: Tensor | None, levels: Tensor) -> None:
    """Validates decision boundaries: sorted, finite, one between each two levels.

    Raises
    ------
    ValueError
        If shape, dtype, order or values are otherwise.
    """
    if boundaries is None:
        return
    wanted = (levels.shape[0], levels.shape[1] - 1)
    if tuple(boundaries.shape) != wanted or boundaries.dtype != torch.float32:
        raise InvalidValueError(
            f"{who}: boundaries must be float32 of shape {wanted}; got {boundaries.dtype} of shape "
            f"{tuple(boundaries.shape)}"
        )
    if not torch.isfinite(boundaries).all() or (boundaries.diff(dim=1) < 0).any():
        raise InvalidValueError(f"{who}: boundaries must be finite and in ascending order; {_disorder(boundaries)}")


def _disorder(rows: Tensor) -> str:
    n_bad, n_down = int((~torch.isfinite(rows)).sum()), int((rows.diff(dim=1) < 0).sum())
    return f"got {n_bad} of {rows.numel()} not finite, {n_down} below the one before"


def check_group(who: str, group_size: int, channels: int | None) -> None:
    """Validates a group size: positive, and a divisor of the channels where those are given.

    Raises
    ------
    ValueError
        If it is not; names the nearest sizes that are.
    """
    if type(group_size) is not int or group_size < 1:
        raise InvalidValueError(f"{who}: group_size must be an integer from 1; got {group_size!r:.60}")
    if channels is not None and channels % group_size:
        fitting = [size for size in range(1, channels + 1) if channels % size == 0]
        nearest = min(fitting, key=lambda size: abs(size - group_size))
        raise InvalidValueError(
            f"{who}: group_size must divide the {channels} channels; got {group_size}. Nearest that does: {nearest}"
        )
