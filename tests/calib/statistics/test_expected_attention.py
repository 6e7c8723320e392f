"""Expected attention from the moments of queries, against many drawn queries."""

import pytest
import torch
from torch import Tensor

from artifacts.sites import Site
from calib.statistics.readers import log_attention
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

pytestmark = pytest.mark.shapes

HEAD_DIM, CONTEXT = 8, 12
FREQUENCIES = (1.0, 0.3, 0.1)


def shape_of(tensor: str, heads: int) -> SiteShape:
    site = Site(0, tensor, "pre_rope")
    return SiteShape(site=site, heads=heads, head_dim=HEAD_DIM, rotary_dim=6, frequencies=FREQUENCIES)


def turned(x: Tensor, distance: int) -> Tensor:
    """The six rotary channels of each head by half-split pairs, then two without rotation."""
    angle = distance * torch.tensor(FREQUENCIES)
    first, second = x[..., :3], x[..., 3:6]
    pairs = [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
    return torch.cat([*pairs, x[..., 6:]], dim=-1)


def test_it_is_the_mean_exponential_of_the_logits_of_gaussian_queries() -> None:
    """Two key heads, each read by two query heads; 12 - D pairs of positions of 12 are at distance D."""
    draw = torch.Generator().manual_seed(0)
    queries = 0.5 * torch.randn(20000, 4, HEAD_DIM, generator=draw) + 0.6 * torch.randn(4, HEAD_DIM, generator=draw)
    keys = torch.randn(5, 2 * HEAD_DIM, generator=draw)
    statistics = SiteStatistics(shape_of("query", 4), "basic")
    statistics.update(queries.flatten(1))
    found = log_attention(shape_of("key", 2), keys, statistics, CONTEXT)
    weights = torch.arange(CONTEXT, 0, -1) / sum(range(CONTEXT + 1))
    expected = torch.zeros(5, 2, 2)
    for distance, weight in enumerate(weights):
        logits = torch.einsum("nhgd,khd->nkhg", turned(queries, distance).view(-1, 2, 2, HEAD_DIM), keys.view(5, 2, -1))
        expected += weight * (logits / HEAD_DIM**0.5).exp().mean(dim=0)
    # Queries at different distances are a mixture of Gaussians: the moments have its spread and not its shape.
    assert expected.log().abs().max() > 0.5
    torch.testing.assert_close(found.float(), expected.log(), atol=0.05, rtol=0)


def test_a_key_along_the_mean_query_expects_the_most() -> None:
    draw = torch.Generator().manual_seed(1)
    mean = torch.tensor([0.0] * 6 + [3.0, 3.0])
    statistics = SiteStatistics(shape_of("query", 1), "basic")
    statistics.update(torch.randn(500, HEAD_DIM, generator=draw) + mean)
    keys = torch.stack([mean, -mean, torch.zeros(HEAD_DIM)])
    along, against, nowhere = log_attention(shape_of("key", 1), keys, statistics, CONTEXT)[:, 0, 0].tolist()
    assert along > nowhere > against
    assert nowhere == 0
