"""Rotary embedding of the keys, read off the probe: layout of its tables, channels that rotate, frequencies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.errors import UnsupportedLayer
from artifacts.model.heads import nearest
from artifacts.model.rope import Rotation, TableOrder, cos_sin, rotate, spread

_READINGS: tuple[tuple[Rotation, TableOrder], ...] = (
    ("half", "as_read"),
    ("interleaved", "as_read"),
    ("interleaved", "halves"),
    ("half", "once"),
    ("interleaved", "once"),
    ("interleaved", "sines_first"),
)


@dataclass(frozen=True)
class Turning:
    """Rotary embedding of the keys, and the positions of the key heads in the output."""

    heads: list[int]
    rotation: Rotation = "none"
    order: TableOrder = "as_read"
    rotary_dim: int = 0


def found_rotation(x: Tensor, cached: Tensor, position_embeddings: object, source: str) -> Turning:
    """Rotary embedding that makes the cached keys of a projection's output.

    Parameters
    ----------
    x, cached : Tensor
        Output of the projection or norm, and the keys in the cache: batch heads tokens head_dim.
    position_embeddings : object
        Argument of the attention module of that name; None without rotary embedding.
    source : str
        Name of the projection or norm.

    Raises
    ------
    UnsupportedLayer
        If no known layout of the tables gives the cached keys.
    """
    tables = _cos_sin(position_embeddings)
    heads = nearest(cached, x)
    if _agree(cached, x[:, heads], x[:, heads]):
        return Turning(heads)
    # The cached key is noise of the probe after an unknown rotation: try each layout until one reproduces it.
    for rotation, order in _READINGS if tables else ():
        cos, sin = (spread(table.double(), order, rotation) for table in cos_sin(tables, order))
        pairs, rest = divmod(cos.shape[-1], 2)
        if rest or 2 * pairs > x.shape[-1]:
            continue
        turned = rotate(x.double(), cos, sin, rotation)
        heads = nearest(cached, turned)
        if _agree(cached, turned[:, heads], x[:, heads]):
            return Turning(heads, rotation, order, 2 * pairs)
    raise UnsupportedLayer(
        f"the cached key must be the output of {source}, with or without rotation by position_embeddings; it is neither"
    )


def table_frequencies(position_embeddings: object, turning: Turning) -> tuple[float, ...]:
    """Radians per position of each rotary pair, from the second position of the model's own tables."""
    # Row 1 of the tables holds a cos f and a sin f for each pair i, with f = 10000^(-2 i / d) in the original (arXiv
    # 2104.09864, section 3.2.2) and a an attention scale such as YaRN's: atan2 recovers f for any base, scaling and a.
    rotation = turning.rotation
    if rotation == "none":
        return ()
    tables = cos_sin(_cos_sin(position_embeddings), turning.order)
    cos, sin = (spread(table[0, 1].double(), turning.order, rotation) for table in tables)
    angles = torch.atan2(sin, cos)
    pairs: list[float] = (angles[: len(angles) // 2] if rotation == "half" else angles[::2]).tolist()
    return tuple(pairs)


def _cos_sin(position_embeddings: object) -> tuple[Tensor, ...]:
    """Tables (cos, sin) of the model; empty without rotary embedding."""
    match position_embeddings:
        case None:
            return ()
        case [Tensor(ndim=3) as cos, Tensor(ndim=3) as sin] if cos.is_floating_point():
            return cos, sin
    raise UnsupportedLayer(
        "position_embeddings must be a pair (cos, sin) of tensors batch tokens rotary_dim; got "
        f"{type(position_embeddings).__name__}"
    )


def _agree(cached: Tensor, expected: Tensor, x: Tensor) -> bool:
    """True if `cached` is `expected` up to rounding."""
    # expected = x cos - y sin: two products and a sum, each off by at most eps of its size, and |y sin| is at most
    # |expected| + |x cos|, so the error is below 4 eps (2 |x| + |expected|). A float64 model may rotate in float32.
    bound = (
        4
        * max(torch.finfo(cached.dtype).eps, torch.finfo(torch.float32).eps)
        * (2 * x.double().abs() + expected.double().abs())
    )
    return bool(((cached.double() - expected.double()).abs() <= bound).all())
