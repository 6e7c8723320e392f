"""Synthetic activations and their statistics, for benchmarks without a model."""

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.sites import Site, Stage
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.origin import Origin
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import Tier
from calib.statistics.token_batch import TokenBatch

WINDOW_TOKENS = 512
"""Tokens of a calibration window."""


def model_statistics(
    tokens: int, heads: int, layers: int, stage: Stage = "pre_rope", tier: Tier = "basic", head_dim: int = 128
) -> ModelStatistics:
    """Statistics of a model, gathered for the first two layers and copied to the others.

    Every query head reads a key head of its own, and copies of the vectors stand for gradients.
    """
    shapes = [
        SiteShape(site=site, heads=heads, head_dim=head_dim)
        for layer in range(layers)
        for site in (Site(layer, "key", stage), Site(layer, "value"), Site(layer, "query", stage))
    ]
    origin = Origin(model={}, model_id=None, corpus="synthetic", seed=0, tool_version="benchmark")
    gathered = ModelStatistics(shapes[:6], tier, origin, fisher=True)
    positions = torch.arange(tokens) % WINDOW_TOKENS
    windows = torch.arange(tokens) // WINDOW_TOKENS
    batch = TokenBatch(positions, windows, [f"{number:032x}" for number in range(int(windows.max()) + 1)])
    vectors = {s.site: site_values(tokens, s.channels, seed=n) for n, s in enumerate(shapes[:6])}
    gathered.update(batch, vectors, {site: x for site, x in vectors.items() if site.tensor != "query"})
    whole = ModelStatistics(shapes, tier, origin, fisher=True)
    whole.sample, whole.first, whole.windows = gathered.sample, gathered.first, gathered.windows
    whole.n_tokens, whole.seqlen = gathered.n_tokens, gathered.seqlen
    for site, statistics in whole.sites.items():
        state = gathered.sites[_gathered(site)].state()
        statistics.restore({name: tensor.clone() for name, tensor in state.items()})
    for (left, right), moments in whole.cross.items():
        a, b = _gathered(left), _gathered(right)
        moments.products += gathered.cross[a, b].products if a < b else gathered.cross[b, a].products.T
    return whole


def _gathered(site: Site) -> Site:
    return Site(site.layer % 2, site.tensor, site.stage)


def site_values(tokens: int, channels: int, seed: int) -> Float32[Tensor, "tokens channels"]:
    """Synthetic activations: correlated channels of different spreads, offset, tokens of different scales, outliers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # 64 common factors correlate the channels. Spreads of channels and scales of tokens are log-normal; 1 % of the
    # values are 3.5 times as large. Means of channels are of the size of their spreads.
    common = normal(tokens, 64) @ normal(64, channels) / 8
    outliers = 1 + 2.5 * (torch.rand(tokens, channels, generator=generator) < 0.01)
    spread = torch.exp(0.8 * normal(channels))
    scale = torch.exp(0.3 * normal(tokens, 1))
    return spread * (0.7 * (common + normal(tokens, channels)) * scale * outliers + normal(channels))
