"""One forward pass per batch of windows, and what the sites gave during it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from artifacts.attention import AttentionLayer, tapped
from artifacts.layout import to_rows
from artifacts.sites import Site, Stage
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_statistics import SiteShape
from calib.statistics.token_batch import TokenBatch
from calib.windows import window_digests

Vectors = dict[Site, Float[Tensor, "_ _"]]


def site_shapes(layers: Sequence[AttentionLayer], stage: Stage) -> list[SiteShape]:
    """Keys and queries at one stage, and values, of every layer."""
    shapes = []
    for layer in layers:
        pairs: dict[str, Any] = {"rotary_dim": layer.rotary_dim, "interleaved": layer.rotation == "interleaved"}
        key, query = Site(layer.layer, "key", stage), Site(layer.layer, "query", stage)
        shapes += [
            SiteShape(site=key, heads=layer.kv_heads, head_dim=layer.head_dim, **pairs),
            SiteShape(site=Site(layer.layer, "value"), heads=layer.kv_heads, head_dim=layer.head_dim),
            SiteShape(site=query, heads=layer.q_heads, head_dim=layer.head_dim, **pairs),
        ]
    return shapes


@torch.no_grad()
def capture(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    sites: Iterable[Site],
    input_ids: Int64[Tensor, "windows tokens"],
    attention_mask: Bool[Tensor, "windows tokens"] | None = None,
) -> Vectors:
    """What each site gives during one forward pass, real tokens only, window after window.

    Parameters
    ----------
    model : nn.Module
        A transformers model; it is as it was afterwards, also after an error.
    layers : Sequence[AttentionLayer]
        Its attention layers.
    sites : Iterable[Site]
        What to observe.
    input_ids : Int64[Tensor, "windows tokens"]
        Token ids.
    attention_mask : Bool[Tensor, "windows tokens"] or None
        False at padding, on either side; None where nothing is padded.
    """
    vectors: Vectors = {}
    real = None if attention_mask is None else attention_mask.reshape(-1)

    def observer(site: Site) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            rows = to_rows(x)
            vectors[site] = (rows if real is None else rows[real.to(rows.device)]).clone()

        return observe

    device = next(model.parameters()).device
    padding = {} if attention_mask is None else _padding_arguments(attention_mask.to(device, torch.int64))
    with tapped(layers, {site: observer(site) for site in sites}):
        model(input_ids=input_ids.to(device), use_cache=False, **padding)
    return vectors


def collect(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    statistics: ModelStatistics,
    batches: Iterable[tuple[Int64[Tensor, "_ _"], Bool[Tensor, "_ _"] | None]],
) -> None:
    """Feeds the statistics with batches of windows, each with its attention mask or None.

    After an error or an interrupt the statistics hold every batch before it, and nothing of it.

    Raises
    ------
    NonFiniteError
        If the model gives NaN or infinity, with site, window and count.
    """
    number = len(statistics.windows)
    for input_ids, mask in batches:
        batch = token_batch(input_ids, mask, number)
        # Not bound to a name: it would live on through the next forward pass, and with it a second window's vectors.
        statistics.update(batch, capture(model, layers, statistics.sites, input_ids, mask))
        number += len(input_ids)


def _padding_arguments(mask: Int64[Tensor, "windows tokens"]) -> dict[str, Tensor]:
    """Mask, and positions that count real tokens only, so that padding on the left rotates nothing."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}


def token_batch(
    input_ids: Int64[Tensor, "windows tokens"], mask: Bool[Tensor, "windows tokens"] | None, first_window: int
) -> TokenBatch:
    """Positions and windows of the real tokens of a batch."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    positions = (real.cumsum(dim=1) - 1)[real]
    windows = torch.arange(first_window, first_window + len(input_ids))[:, None].expand_as(input_ids)[real]
    digests = [window_digests(row[keep][None])[0] for row, keep in zip(input_ids, real, strict=True)]
    return TokenBatch(positions=positions, windows=windows, digests=digests)


def single_windows(windows: Int64[Tensor, "windows tokens"]) -> Iterator[tuple[Tensor, None]]:
    """Unpadded windows, one forward pass each."""
    for window in windows:
        yield window[None], None
