"""Quantizers with the structure of two recipes, made up instead of fitted, for what is to be timed.

Bases, weights and levels come from a seed: time and bytes depend on shapes and on numbers of levels, not on values.
"""

from collections.abc import Iterator

import torch

from artifacts.quantizer import Quantizer
from artifacts.quantizers.mixed_codebook import MixedCodebook, mean_bits
from artifacts.quantizers.predicted import Predicted
from artifacts.quantizers.rotated import Rotated
from artifacts.sites import Site

LEVELS = (24, 12, 8, 5, 3, 2, 1, 1)
"""Of an eighth of a basis' components each, largest components first: 2 bits in the mean."""

_WEIGHT = 0.01
"""Standard deviation of a predictor's entries, so small that thousands of terms add up to no more than a value."""


def eigen(layers: int, heads: int, head_dim: int) -> dict[Site, Quantizer]:
    """Each head in a basis of its own, as in the recipe `eigen`."""
    generator = torch.Generator().manual_seed(0)
    return {site: _rotated(heads, head_dim, generator) for site in _sites(layers)}


def predictive(layers: int, heads: int, head_dim: int) -> dict[Site, Quantizer]:
    """All heads in one basis, of what a prediction leaves, as in the recipe `predictive`.

    Sources are keys and values of the layer before and, of values, the layer's own keys; the first keys have none.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[Site, Quantizer] = {}
    for site in _sites(layers):
        sources = [other for other in found if other.layer >= site.layer - 1]
        inner = _rotated(1, heads * head_dim, generator)
        found[site] = _predicted(site, sources, inner, generator) if sources else inner
    return found


def _sites(layers: int) -> Iterator[Site]:
    for layer in range(layers):
        yield Site(layer, "key", "pre_rope")
        yield Site(layer, "value")


def _predicted(site: Site, sources: list[Site], inner: Quantizer, generator: torch.Generator) -> Predicted:
    channels = inner.channels
    weight = _WEIGHT * torch.randn(len(sources) * channels, channels, generator=generator)
    return Predicted(
        channels=channels,
        site=site,
        inner=inner,
        source_sites=" ".join(map(str, sources)),
        weight=weight.half(),
        bias=torch.zeros(channels),
    )


def _rotated(groups: int, width: int, generator: torch.Generator) -> Rotated:
    basis = torch.linalg.qr(torch.randn(groups, width, width, generator=generator)).Q
    return Rotated(channels=groups * width, inner=_codebook(groups, width), basis=basis)


def _codebook(groups: int, width: int) -> MixedCodebook:
    """With evenly spaced levels around zero."""
    n_levels = torch.tensor(LEVELS, dtype=torch.int16).repeat_interleave(width // len(LEVELS)).repeat(groups)
    tables = [(torch.arange(n) - (n - 1) / 2) * 4 / n for n in n_levels.tolist()]
    channels = groups * width
    return MixedCodebook(
        channels=channels,
        bits=mean_bits(n_levels),
        scale=torch.ones(channels),
        offset=torch.zeros(channels),
        n_levels=n_levels,
        levels=torch.cat(tables).half(),
    )
