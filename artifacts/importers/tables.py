"""Quantizers from the numbers that KVQuant and its descendants keep: ends of ranges, and tables of levels."""

from typing import Any

import torch
from jaxtyping import Float16, Float32, Float64
from torch import Tensor

from artifacts.errors import CorruptArtifactError
from artifacts.importers.hints import Hints
from artifacts.importers.layer_names import text_sites
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.sparse import PercentileSparse, ThresholdSparse
from artifacts.sites import Site

_NARROWEST = 2.0**-100
"""Scale of a channel whose range is a point: beside its offset every level vanishes."""


def by_site(content: dict[object, object]) -> tuple[dict[Site, object], list[str]]:
    """Entries by site, and notices of what else there was.

    Raises
    ------
    CorruptArtifactError
        If a name is no projection of a layer, or two could stand for one site.
    """
    old = [name for name in content if isinstance(name, str) and ".lut" in name]
    odd = [name for name in content if not isinstance(name, str)]
    if odd or len(old) == len(content):
        got = f"{odd[0]!r:.80}" if odd else "none"
        raise CorruptArtifactError(f"expected quantizers of k_proj and v_proj; got {got}")
    names, notices = text_sites([name for name in content if isinstance(name, str) and name not in old], "pre_rope")
    if old:
        notices.append(f"{len(old)} old entries, such as {old[0]}, were left out")
    return {site: content[name] for site, name in names.items()}, notices


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
