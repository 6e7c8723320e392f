"""Quantizers from the numbers that KVQuant and its descendants keep: ends of ranges, and tables of levels."""

import re
from typing import Any

import torch
from jaxtyping import Float16, Float32, Float64
from torch import Tensor

from artifacts.affine import Affine
from artifacts.codebook import Codebook, DynamicCodebook
from artifacts.dynamic_affine import DynamicAffine
from artifacts.errors import CorruptArtifactError
from artifacts.importers.hints import Hints
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.sparse import PercentileSparse, ThresholdSparse

_NAME = re.compile(r"(?:.*\.)?(?:layers|blocks)\.(\d{1,6})\.(?:.*\.)?([kv])_proj")
_NARROWEST = 2.0**-100
"""Scale of a channel whose range is a point: beside its offset every level vanishes."""


def site_of(name: str) -> Site | None:
    """The site of a projection's name, `model.layers.3.self_attn.k_proj` or `transformer.blocks.3.v_proj`."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, tensor = match.groups()
    return Site(int(layer), "key", "pre_rope") if tensor == "k" else Site(int(layer), "value")


def by_site(content: dict[object, object]) -> tuple[dict[Site, object], list[str]]:
    """Entries by site, and a notice of what else there was.

    Raises
    ------
    CorruptArtifactError
        If a name is no projection of a layer.
    """
    entries, left = {}, []
    for name, entry in content.items():
        site = site_of(name) if isinstance(name, str) else None
        if site is not None:
            entries[site] = entry
        elif isinstance(name, str) and ".lut" in name:
            left.append(name)
        else:
            raise CorruptArtifactError(f"expected names such as model.layers.0.self_attn.k_proj; got {name!r:.80}")
    if not entries:
        raise CorruptArtifactError("expected quantizers of k_proj and v_proj; got none")
    return entries, [f"{len(left)} old entries, such as {left[0]}, were left out"] if left else []


def numbers(site: Site, name: str, value: object) -> Float64[Tensor, " n"]:
    """A vector of finite numbers from an array, a tensor, or a list that holds one.

    Raises
    ------
    CorruptArtifactError
        If it is none.
    """
    inside = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    try:
        vector = torch.as_tensor(inside).detach().double().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CorruptArtifactError(f"{site}: {name}: expected an array of numbers; got {inside!r:.60}") from error
    bad = int((~torch.isfinite(vector)).sum())
    if bad or not len(vector):
        raise CorruptArtifactError(
            f"{site}: {name}: expected finite numbers; got {len(vector)}, {bad} of them not finite"
        )
    return vector


def halved(site: Site, name: str, vector: Float64[Tensor, " n"]) -> Float16[Tensor, " n"]:
    """The numbers in float16, as these tools use them.

    Raises
    ------
    CorruptArtifactError
        If one is too large.
    """
    half = vector.half()
    if not torch.isfinite(half).all():
        raise CorruptArtifactError(f"{site}: {name}: {float(vector.abs().max()):.4g} does not fit float16")
    return half


def static(site: Site, lower: Tensor, upper: Tensor, table: "Table | None", hints: Hints) -> Quantizer:
    """A channel's range is the same for all tokens.

    Raises
    ------
    CorruptArtifactError
        If a lower end lies above its upper end.
    """
    low, high = halved(site, "lower", lower), halved(site, "upper", upper)
    if low.shape != high.shape or (low > high).any():
        raise CorruptArtifactError(
            f"{site}: expected a lower and a higher end for each channel; got {len(low)} and {len(high)}, "
            f"{int((low > high).sum()) if low.shape == high.shape else '?'} of them exchanged"
        )
    inner = _static_inner(site, low, high, table, hints)
    if hints.outlier_fraction is None:
        return inner
    return ThresholdSparse(channels=len(low), inner=inner, lower=low.float(), upper=high.float())


def _static_inner(site: Site, low: Tensor, high: Tensor, table: "Table | None", hints: Hints) -> Quantizer:
    channels = len(low)
    if table is not None:
        scale, offset = ((high - low) / 2).float(), ((high + low) / 2).float()
        offset = torch.where(scale > 0, offset, low.float())
        scale = torch.where(scale > 0, scale, _NARROWEST)
        return Codebook(channels=channels, bits=table.bits, scale=scale, offset=offset, **table.fields)
    bits = hints.bits_of_range(str(site))
    scale = ((high.float() - low.float()) / (2**bits - 1)).clamp_min(_NARROWEST)
    return Affine(channels=channels, bits=bits, scale=scale, offset=low.float())


def dynamic(site: Site, channels: int, table: "Table | None", hints: Hints) -> Quantizer:
    """The range is each token's own."""
    inner: Quantizer
    if table is not None:
        inner = DynamicCodebook(channels=channels, bits=table.bits, **table.fields)
    else:
        inner = DynamicAffine(channels=channels, bits=hints.bits_of_range(str(site)))
    fraction = hints.outlier_fraction
    return inner if fraction is None else PercentileSparse(channels=channels, inner=inner, outlier_fraction=fraction)


class Table:
    """Levels in ascending order, with the boundaries between them where those are not the middles.

    Parameters
    ----------
    site : Site
        Named in errors.
    levels : Float64[Tensor, "levels"]
        In any order.
    hints : Hints
        Must not contradict the number of levels.
    gain, shift : float
        What is decoded is level * gain + shift, while codes are chosen by the levels themselves (Q-Norm).
    """

    def __init__(self, site: Site, levels: Tensor, hints: Hints, gain: float = 1.0, shift: float = 0.0) -> None:
        self.bits = hints.bits_of_table(str(site), len(levels))
        ordered = levels.sort().values
        self.fields: dict[str, Any] = {"levels": halved(site, "levels", ordered * gain + shift)[None]}
        if (gain, shift) != (1.0, 0.0):
            if gain <= 0:
                raise CorruptArtifactError(f"{site}: expected a positive scale of the levels; got {gain:.4g}")
            own = halved(site, "levels", ordered).float()
            self.fields["boundaries"] = ((own[1:] + own[:-1]) / 2)[None]


def normal_float(bits: int) -> Float32[Tensor, " levels"]:
    """NormalFloat levels on [-1, 1]: quantiles of a Gaussian, each side scaled by itself (arXiv 2305.14314)."""
    tail = 0.5 * (1 / 32 + 1 / 30)
    below = torch.special.ndtri(torch.linspace(tail, 0.5, 2 ** (bits - 1), dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, 1 - tail, 2 ** (bits - 1) + 1, dtype=torch.float64))
    return torch.cat([below / -below[0], (above / above[-1])[1:]]).float()
