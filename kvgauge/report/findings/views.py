"""Views of the sites that cost most: ranges of channels, levels over histograms, and what is kept beside the codes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from artifacts.model.attention import AttentionLayer
from artifacts.model.layout import to_rows
from artifacts.quantizer import Quantizer
from artifacts.quantizers.codebook import DynamicCodebook
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.quantizers.sparse import AbstractSparse, CompactSparse, ThresholdSparse, clamp_outliers
from artifacts.quantizers.wrapper import AbstractTransform, AbstractWrapper
from artifacts.sites import Site
from kvgauge.report.reported_run import ReportedRun
from simquant.evaluation.attention_inputs import AttentionInputs, attention_inputs

_WINDOWS = 4
"""Enough for a picture, and they are held in memory."""

_TAIL = 0.005
"""Inner range: all but half a per cent on each side."""

_FAR = 1e30
"""Beyond any range, and not so far that steps overflow."""

_BINS = 64
_GRID = 4096
"""Values at which a channel's levels are looked for: between any two of 256 levels that can be told apart in print."""

_MOST_LEVELS = 64


def worst_sites(rows: Mapping[str, Mapping[str, Any]]) -> list[Site]:
    """The keys and the values that lose most nats, or have the largest error where losses say nothing."""
    sites = [Site.parse(name) for name in sorted(rows, key=lambda name: _cost(rows[name]), reverse=True)]
    return [next(site for site in sites if site.tensor == tensor) for tensor in ("key", "value")]


@torch.no_grad()
def value_views(run: ReportedRun, layers: Sequence[AttentionLayer], sites: Sequence[Site]) -> dict[str, Any]:
    """Ranges and levels of some sites, as JSON values."""
    sinks = run.settings["policy"].sink_tokens
    parts: dict[tuple[Site, str], list[Tensor]] = {}
    for window in run.windows[:_WINDOWS]:
        for place, rows in _vectors(attention_inputs(run.loaded.model, layers, window), run.quantizers, sites):
            parts.setdefault(place, []).append(rows[sinks:])
    vectors = {place: torch.cat(rows) for place, rows in parts.items()}
    cpu = {site: run.quantizers[site].to(torch.device("cpu")) for site in sites}
    return {
        "ranges": [_ranges(site, when, x, cpu[site], layers) for (site, when), x in vectors.items()],
        "levels": {str(site): levels_over_values(cpu[site], vectors[site, _stage(site)]) for site in sites},
    }


def _cost(row: Mapping[str, Any]) -> tuple[float, float]:
    """Cost of a site; one that is no number ranks first."""
    share, error = row["loss_share"], row["output_error"] or 0.0
    return math.inf if math.isnan(share) else share, math.inf if math.isnan(error) else error


def _vectors(
    seen: Sequence[Any], quantizers: Mapping[Site, Quantizer], sites: Sequence[Site]
) -> Iterator[tuple[tuple[Site, str], Float32[Tensor, "tokens channels"]]]:
    """Vectors of each site: keys before and after rotation, values once."""
    for inputs in seen:
        for site in (site for site in sites if site.layer == inputs.layer.layer):
            if site.tensor == "value":
                yield (site, ""), rows_of(inputs, quantizers)[site]
            else:
                yield (site, "pre_rope"), to_rows(inputs.key).float().cpu()
                if inputs.tables is not None:
                    yield (site, "post_rope"), to_rows(inputs.rotated(inputs.key)).float().cpu()


def _stage(site: Site) -> str:
    return site.stage or ""


def _ranges(
    site: Site,
    stage: str,
    x: Float32[Tensor, "tokens channels"],
    quantizer: Quantizer,
    layers: Sequence[AttentionLayer],
) -> dict[str, Any]:
    """Of each channel, and what the quantizer holds where it stands at this stage and its range is static."""
    inner = torch.quantile(x.T.contiguous(), torch.tensor([_TAIL, 1 - _TAIL]), dim=1)
    reach = static_range(quantizer) if stage == _stage(site) else None
    low, high = (None, None) if reach is None else (_short(end) for end in reach)
    return {
        "site": str(site),
        "stage": stage,
        "quantized_here": stage == _stage(site),
        "head_dim": next(layer.head_dim for layer in layers if layer.layer == site.layer),
        "n_tokens": len(x),
        "minimum": _short(x.amin(dim=0)),
        "inner_low": _short(inner[0]),
        "inner_high": _short(inner[1]),
        "maximum": _short(x.amax(dim=0)),
        "static_low": low,
        "static_high": high,
    }


def _short(x: Tensor) -> list[float]:
    """Five digits are more than a picture shows."""
    return [float(f"{value:.5g}") for value in x.tolist()]


def rows_of(
    inputs: AttentionInputs, quantizers: Mapping[Site, Quantizer]
) -> dict[Site, Float32[Tensor, "tokens channels"]]:
    """The vectors of a layer's two sites, as their quantizers take them."""
    index = inputs.layer.layer
    before = Site(index, "key", "pre_rope")
    key = before if before in quantizers else Site(index, "key", "post_rope")
    vectors = {key: inputs.key if key == before else inputs.rotated(inputs.key), Site(index, "value"): inputs.value}
    return {site: to_rows(x).float().cpu() for site, x in vectors.items()}


def static_range(quantizer: Quantizer) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]] | None:
    """Smallest and largest value of each channel that codes can give back, or that is not kept beside them.

    None where scales come with the tokens, or belong to transformed values.
    """
    if isinstance(quantizer, ThresholdSparse):
        return quantizer.lower, quantizer.upper
    if isinstance(quantizer, AbstractSparse | CompactSparse | ExactSinks):
        return static_range(quantizer.inner)
    # Every kind of quantizer tells its range this way, without a case for each: values far beyond it come back as its
    # ends.
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
    if isinstance(quantizer, ExactSinks):
        tokens, values = quantizer.mask(x)[:, None].expand_as(x), kept_mask(quantizer.inner, x)
        return tokens if values is None else tokens | values
    return None


def levels_over_values(quantizer: Quantizer, x: Float32[Tensor, "tokens channels"]) -> dict[str, Any] | None:
    """A histogram of values and the levels that stand for them; None where no levels are fitted.

    Static levels are shown on the channel whose squared error is largest, levels within each token's own range on all
    values.
    """
    if isinstance(quantizer, ExactSinks):
        coded = ~quantizer.mask(x)
        x, quantizer = x[coded] if coded.any() else x, quantizer.inner
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
    # Levels are read off the quantizer: a fine grid over the range comes back as them, whatever encodes it.
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
    inside = clamp_outliers(x, mask)
    # In units of each token's range without its outliers: (x - middle) / half lies in [-1, 1], where the shared levels
    # are.
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
