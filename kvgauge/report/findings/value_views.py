"""Values of the sites that cost most: ranges of their channels, levels over histograms, channels with outliers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.model.attention import AttentionLayer
from artifacts.model.layout import to_rows
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from kvgauge.report.findings.quantizer_views import levels_over_values, static_range
from kvgauge.report.findings.site_findings import rows_of
from kvgauge.report.reported_run import ReportedRun
from simquant.evaluation.attention_inputs import attention_inputs

_WINDOWS = 4
"""Enough for a picture, and they are held in memory."""

_TAIL = 0.005
"""Inner range: all but half a per cent on each side."""


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
    """What is no number ranks first."""
    share, error = row["loss_share"], row["output_error"] or 0.0
    return math.inf if math.isnan(share) else share, math.inf if math.isnan(error) else error


def _vectors(
    seen: Sequence[Any], quantizers: Mapping[Site, Quantizer], sites: Sequence[Site]
) -> Iterator[tuple[tuple[Site, str], Float32[Tensor, "tokens channels"]]]:
    """What stands at each site: keys before and after rotation, values once."""
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
