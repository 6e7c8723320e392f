"""What a picture needs to know of a quantizer: its static range, its levels, and what it keeps beside its codes."""

from typing import Any

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.codebook import DynamicCodebook
from artifacts.quantizers.sparse import AbstractSparse, CompactSparse, ThresholdSparse, move_to_edge
from artifacts.quantizers.wrapper import AbstractTransform, AbstractWrapper

_FAR = 1e30
"""Beyond any range, and not so far that steps overflow."""

_BINS = 64
_GRID = 4096
"""Values at which a channel's levels are looked for: between any two of 256 levels that can be told apart in print."""

_MOST_LEVELS = 64


def static_range(quantizer: Quantizer) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]] | None:
    """Smallest and largest value of each channel that codes can give back, or that is not kept beside them.

    None where scales come with the tokens, or belong to transformed values.
    """
    if isinstance(quantizer, ThresholdSparse):
        return quantizer.lower, quantizer.upper
    if isinstance(quantizer, AbstractSparse | CompactSparse):
        return static_range(quantizer.inner)
    far = torch.full((1, quantizer.channels), _FAR)
    if isinstance(quantizer, AbstractWrapper) or quantizer.outside(far) is None:
        return None
    return quantizer.simulate(-far)[0], quantizer.simulate(far)[0]


def kept_mask(quantizer: Quantizer, x: Float32[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"] | None:
    """True where a value is kept beside the codes; None for a quantizer that has codes alone."""
    if isinstance(quantizer, AbstractSparse | CompactSparse):
        return quantizer.mask(x)
    if isinstance(quantizer, AbstractTransform):
        return kept_mask(quantizer.inner, quantizer.transform(x))
    return None


def levels_over_values(quantizer: Quantizer, x: Float32[Tensor, "tokens channels"]) -> dict[str, Any] | None:
    """A histogram of values and the levels that stand for them; None where no levels are fitted.

    Static levels are shown on the channel whose squared error is largest, levels within each token's own range on all
    values.
    """
    changes = ""
    while isinstance(quantizer, AbstractTransform):
        x, changes, quantizer = quantizer.transform(x), f"{changes}, {quantizer.kind}", quantizer.inner
    inner = quantizer.inner if isinstance(quantizer, AbstractSparse | CompactSparse) else quantizer
    if isinstance(inner, DynamicCodebook):
        found = _of_tokens(inner, x, kept_mask(quantizer, x))
    elif (reach := static_range(inner)) is not None:
        found = _of_channel(quantizer, inner, x, reach)
    else:
        return None
    return {**found, "what": found["what"] + changes}


def _of_channel(
    whole: Quantizer, inner: Quantizer, x: Float32[Tensor, "tokens channels"], reach: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    channel = int((whole.simulate(x) - x).square().sum(dim=0).argmax())
    low, high = (float(end[channel]) for end in reach)
    grid = torch.zeros(_GRID, inner.channels)
    grid[:, channel] = torch.linspace(low, high, _GRID)
    levels = inner.simulate(grid)[:, channel].unique()
    outer = static_range(whole) if isinstance(whole, ThresholdSparse) else None
    return {
        "what": f"values of channel {channel}, the one with the largest squared error",
        "channel": channel,
        "unit": "value",
        **_histogram(x[:, channel], levels),
        "thresholds": [] if outer is None else [float(end[channel]) for end in outer],
    }


def _of_tokens(
    inner: DynamicCodebook, x: Float32[Tensor, "tokens channels"], kept: Bool[Tensor, "tokens channels"] | None
) -> dict[str, Any]:
    mask = torch.zeros_like(x, dtype=torch.bool) if kept is None else kept
    inside = move_to_edge(x, mask)
    low, high = torch.aminmax(inside, dim=1, keepdim=True)
    half = ((high - low) / 2).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "what": "values of all channels" + ("" if kept is None else " but those kept exact"),
        "channel": None,
        "unit": "value within its token's range",
        **_histogram(((inside - (low + high) / 2) / half)[~mask], inner.levels[0].float()),
        "thresholds": [],
    }


def _histogram(values: Float32[Tensor, " values"], levels: Float32[Tensor, " levels"]) -> dict[str, Any]:
    low, high = float(torch.minimum(values.min(), levels.min())), float(torch.maximum(values.max(), levels.max()))
    counts = torch.histc(values, bins=_BINS, min=low, max=high) if high > low else torch.ones(1)
    return {
        "low": low,
        "high": high,
        "shares": (counts / counts.sum()).tolist(),
        "levels": levels.tolist() if len(levels) <= _MOST_LEVELS else [],
        "n_levels": len(levels),
    }
