"""Levels that go where they save most: against all other ways to spend the budget, and within its bytes."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from artifacts.coding.mixed_radix import MixedRadix, _cut, bytes_per_token
from artifacts.quantizers.mixed_codebook import MixedCodebook
from artifacts.sites import Site
from calib.estimators import CodebookEstimator, MixedCodebookEstimator, RotatedEstimator, mixed_codebook
from calib.estimators.estimator import trial_statistics
from calib.estimators.mixed_codebook import LEVEL_COUNTS, allocate_levels
from calib.statistics.readers import logit_metric
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

pytestmark = pytest.mark.shapes

KEY = Site(0, "key", "pre_rope")


def gaussian_distortions(deviations: list[float]) -> Tensor:
    """About what the best k levels leave of components with these deviations."""
    rate = torch.tensor([1.0, 0.3634, 0.1902, 0.1175, 0.0799, 0.058])
    tail = torch.tensor([2.72 / n**2 for n in LEVEL_COUNTS[6:]])
    return (torch.tensor(deviations)[:, None] ** 2 * torch.cat([rate, tail])).double()


def statistics_of(x: Tensor, heads: int = 2) -> SiteStatistics:
    shape = SiteShape(site=KEY, heads=heads, head_dim=x.shape[1] // heads)
    statistics = SiteStatistics(shape, "full")
    statistics.update(x)
    statistics.samples["rows"] = x
    return statistics


def test_no_other_allotment_on_the_hull_is_better() -> None:
    """The steps are taken from the steepest on, so nothing with as many bits, to a step, leaves less."""
    distortions = gaussian_distortions([3.0, 1.0, 0.5, 0.1])
    chosen = allocate_levels(distortions, bits=2.0)
    spent = sum(math.log2(n) for n in chosen)
    assert spent <= 8
    index = {n: i for i, n in enumerate(LEVEL_COUNTS)}
    found = sum(float(distortions[c, index[n]]) for c, n in enumerate(chosen))
    few = LEVEL_COUNTS[:16]
    best = min(
        sum(float(distortions[c, index[n]]) for c, n in enumerate(counts))
        for counts in itertools.product(few, repeat=4)
        if sum(math.log2(n) for n in counts) <= spent
    )
    assert found <= best * 1.0001


def test_words_are_long_where_any_cut_takes_as_many_bits() -> None:
    """Each word costs time: powers of two were once cut into words of one digit."""
    assert [stop - start for start, stop, _ in _cut([4] * 100)] == [28, 28, 28, 16]


@pytest.mark.parametrize("n_components", [0, 1, 7, 50, 300])
def test_bytes_are_those_of_the_words(n_components: int) -> None:
    generator = torch.Generator().manual_seed(n_components)
    for _ in range(20):
        counts = torch.tensor(LEVEL_COUNTS)[torch.randint(len(LEVEL_COUNTS), (n_components,), generator=generator)]
        assert mixed_codebook.bytes_per_token(counts.numpy()) == bytes_per_token(counts.tolist())
    assert mixed_codebook.bytes_per_token(np.full(n_components, 256)) == n_components


@pytest.mark.parametrize("bits", [0.25, 0.5, 1.0, 1.7, 2.5, 3.3, 4.0, 6.0])
@pytest.mark.parametrize("n_components", [8, 32, 67])
def test_bytes_stay_within_the_budget_and_use_it(bits: float, n_components: int) -> None:
    counts = allocate_levels(gaussian_distortions([2.0 ** (-0.2 * c) for c in range(n_components)]), bits)
    n_bytes = MixedRadix(counts).bytes_per_token
    assert n_bytes <= n_components * bits / 8
    assert n_bytes >= int(n_components * bits / 8) - 1


def test_more_bits_never_leave_more() -> None:
    x = torch.randn(2000, 16) * torch.logspace(0, -2, 16)
    errors = [
        float((MixedCodebookEstimator(bits=bits).fit(statistics_of(x)).quantizer.simulate(x) - x).square().sum())
        for bits in (0.5, 1, 1.5, 2, 3, 4, 6)
    ]
    assert errors == sorted(errors, reverse=True)


def test_unequal_channels_gain_from_unequal_levels() -> None:
    x = torch.randn(3000, 32) * torch.logspace(0, -2, 32)
    allotted = MixedCodebookEstimator(bits=2).fit(statistics_of(x)).quantizer
    alike = CodebookEstimator(bits=2, tables="channel", pooling=0).fit(statistics_of(x)).quantizer
    codes = allotted.encode(x)
    assert codes.nbytes <= alike.encode(x).nbytes
    assert float((allotted.simulate(x) - x).square().sum()) < 0.5 * float((alike.simulate(x) - x).square().sum())


def test_constant_channels_cost_nothing_and_come_back_exactly() -> None:
    x = torch.randn(500, 8)
    x[:, 3], x[:, 5] = 7.3, 0.0
    quantizer = MixedCodebookEstimator(bits=3).fit(statistics_of(x)).quantizer
    assert isinstance(quantizer, MixedCodebook)
    assert quantizer.n_levels[3] == quantizer.n_levels[5] == 1
    assert torch.equal(quantizer.simulate(x)[:, [3, 5]], x[:, [3, 5]])


# Rotations in front of it


def test_errors_behind_a_weighted_rotation_are_weighted() -> None:
    """|e M|^2 = e^T G e for any error e, which is what makes plain squared error the right thing to minimise there."""
    statistics = trial_statistics(SiteShape(site=KEY, heads=2, head_dim=4))
    factor = torch.randn(2, 4, 4, dtype=torch.float64)
    statistics.query_metric = factor @ factor.mT
    entry = {"method": "mixed_codebook", "bits": 4}
    quantizer = RotatedEstimator(metric="query", inner=entry).fit(statistics).quantizer
    e = torch.randn(50, 8, dtype=torch.float64)
    moved = (e.view(50, 2, 1, 4) @ quantizer.basis.double()).square().sum(dim=(1, 2, 3))
    weighted = torch.einsum("nhi,hij,nhj->n", e.view(50, 2, 4), statistics.query_metric, e.view(50, 2, 4))
    torch.testing.assert_close(moved, weighted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_components_are_uncorrelated_and_ordered(scope: str) -> None:
    x = torch.randn(4000, 8) @ torch.randn(8, 8)
    estimator = RotatedEstimator(scope=scope, inner={"method": "mixed_codebook", "bits": 4})
    quantizer = estimator.fit(statistics_of(x)).quantizer
    z = quantizer.transform(x).unflatten(1, (len(quantizer.basis), -1)).transpose(0, 1)
    centred = (z - z.mean(dim=1, keepdim=True)).double()
    covariance = centred.mT @ centred / len(x)
    variances = covariance.diagonal(dim1=1, dim2=2)
    assert (variances.diff(dim=1) <= 0).all()
    assert ((covariance - torch.diag_embed(variances)).abs().amax(dim=(1, 2)) < 1e-3 * variances.amax(dim=1)).all()


def test_rotation_pays_where_channels_are_correlated() -> None:
    common = torch.randn(3000, 2) @ torch.randn(2, 16)
    x = common + 0.1 * torch.randn(3000, 16)
    entry = {"method": "mixed_codebook", "bits": 2.0}
    rotated = RotatedEstimator(scope="layer", inner=entry).fit(statistics_of(x)).quantizer
    plain = MixedCodebookEstimator(bits=2.0).fit(statistics_of(x)).quantizer
    assert float((rotated.simulate(x) - x).square().sum()) < 0.2 * float((plain.simulate(x) - x).square().sum())


def test_the_metric_is_the_mean_over_distances() -> None:
    """Against turning every query by every distance, one after the other."""
    frequencies = (0.9, 0.05)
    shape = SiteShape(site=KEY, heads=1, head_dim=5, rotary_dim=4, frequencies=frequencies)
    queries = torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    expected, total = torch.zeros(5, 5, dtype=torch.float64), 0
    for distance in range(12):
        turned = queries.clone()
        for pair, frequency in enumerate(frequencies):
            cos, sin = math.cos(distance * frequency), math.sin(distance * frequency)
            a, b = queries[:, pair], queries[:, pair + 2]
            turned[:, pair], turned[:, pair + 2] = a * cos - b * sin, b * cos + a * sin
        expected += (12 - distance) * turned.mT @ turned / 40
        total += 12 - distance
    found = logit_metric(shape, (queries.mT @ queries / 40)[None], 12)
    torch.testing.assert_close(found[0], expected / total)
