"""Quantizers from the parameters of KVQuant and its descendants: ranges and codebooks."""

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
"""Scale of a channel with an empty range: every level then rounds to the offset."""


def by_site(content: dict[object, object]) -> tuple[dict[Site, object], list[str]]:
    """Entries by site, and notices of the entries that were left out.

    Raises
    ------
    CorruptArtifactError
        If a name is no projection of a layer, or two belong to one site.
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
    """Vector of finite numbers from an array, a tensor, or a list of one of these.

    Raises
    ------
    CorruptArtifactError
        If the value is anything else.
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
    """Vector in float16, the precision of these tools.

    Raises
    ------
    CorruptArtifactError
        If a number exceeds the range of float16.
    """
    half = vector.half()
    if not torch.isfinite(half).all():
        raise CorruptArtifactError(
            f"{site}: {name}: {float(vector.abs().max()):.4g} does not fit float16 (largest 65504)"
        )
    return half


def static(site: Site, lower: Tensor, upper: Tensor, table: "Table | None", hints: Hints) -> Quantizer:
    """Quantizer with a static range per channel.

    Raises
    ------
    CorruptArtifactError
        If the numbers of lower and upper ends differ, or a lower end exceeds its upper end.
    """
    low, high = halved(site, "lower", lower), halved(site, "upper", upper)
    if low.shape != high.shape or (low > high).any():
        raise CorruptArtifactError(
            f"{site}: expected a lower and an upper end for each channel; got {len(low)} and {len(high)}, "
            f"{int((low > high).sum()) if low.shape == high.shape else '?'} of them exchanged"
        )
    inner = _static_inner(site, low, high, table, hints)
    if hints.outlier_fraction is None:
        return inner
    return ThresholdSparse(channels=len(low), inner=inner, lower=low.float(), upper=high.float())


def _static_inner(site: Site, low: Tensor, high: Tensor, table: "Table | None", hints: Hints) -> Quantizer:
    channels = len(low)
    if table is not None:
        # KVQuant normalises channels to [-1, 1] by half-range and midpoint, in float16 arithmetic, before the codebook.
        scale, offset = ((high - low) / 2).float(), ((high + low) / 2).float()
        offset = torch.where(scale > 0, offset, low.float())
        scale = torch.where(scale > 0, scale, _NARROWEST)
        return Codebook(channels=channels, bits=table.bits, scale=scale, offset=offset, **table.fields)
    bits = hints.bits_of_range(str(site))
    # Min-max: 2^b codes divide a range into 2^b - 1 steps.
    scale = ((high.float() - low.float()) / (2**bits - 1)).clamp_min(_NARROWEST)
    return Affine(channels=channels, bits=bits, scale=scale, offset=low.float())


def dynamic(site: Site, channels: int, table: "Table | None", hints: Hints) -> Quantizer:
    """Quantizer with a dynamic range per token."""
    inner: Quantizer
    if table is not None:
        inner = DynamicCodebook(channels=channels, bits=table.bits, **table.fields)
    else:
        inner = DynamicAffine(channels=channels, bits=hints.bits_of_range(str(site)))
    fraction = hints.outlier_fraction
    return inner if fraction is None else PercentileSparse(channels=channels, inner=inner, outlier_fraction=fraction)


class Table:
    """Codebook of a file: sorted levels, with decision boundaries where these are not the midpoints.

    Parameters
    ----------
    site : Site
        Named in errors.
    levels : Float64[Tensor, "levels"]
        Levels in any order.
    hints : Hints
        Must not contradict the number of levels.
    gain, shift : float
        Q-Norm: a code decodes to level * gain + shift, but is chosen as the nearest of the levels themselves.
    """

    # Q-Norm (arXiv 2401.18079) gives quantized values the mean m1 and deviation s1 of the data in place of their own m2
    # and s2: level -> (level - m2) * s1 / s2 + m1, after codes are chosen. So boundaries are those of unmapped levels.

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
    # 2^(b-1) quantiles up to zero and 2^(b-1) above it; the outermost probability (1/32 + 1/30) / 2 keeps them finite.
    # For b = 4 these are the levels of appendix E.
    tail = 0.5 * (1 / 32 + 1 / 30)
    below = torch.special.ndtri(torch.linspace(tail, 0.5, 2 ** (bits - 1), dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, 1 - tail, 2 ** (bits - 1) + 1, dtype=torch.float64))
    return torch.cat([below / -below[0], (above / above[-1])[1:]]).float()
