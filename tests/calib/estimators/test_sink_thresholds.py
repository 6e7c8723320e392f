"""Two classes of norms, and where there are none: which tokens are kept exact, and where a site is left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.sites import Site
from calib.estimators import CodebookEstimator, ExactSinksEstimator, PredictedEstimator
from calib.estimators.exact_sinks import sink_threshold
from calib.recipe.errors import RecipeError
from calib.recipe.recipe import Recipe
from calib.statistics.row_sample import RowSample, priorities
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.sources import Sources

pytestmark = pytest.mark.shapes

SITE, CHANNELS = Site(1, "value"), 16
SHAPE = SiteShape(site=SITE, heads=2, head_dim=CHANNELS // 2)
N_WINDOWS, N_TOKENS = 10, 100
INNER = {"method": "codebook", "bits": 3, "per": "channel"}


def of_norm(norms: Tensor) -> Tensor:
    x = torch.randn(len(norms), CHANNELS)
    return x / x.norm(dim=1, keepdim=True) * norms[:, None]


def window(*, first: float = 1.0, small: int = 0) -> Tensor:
    """Tokens of norms from 8 to 12, a first one of its own, and some of norm 1.5 among the others."""
    norms = torch.linspace(8, 12, N_TOKENS)[torch.randperm(N_TOKENS)]
    norms[0] = first
    norms[20 : 20 + small] = 1.5
    return of_norm(norms)


def gathered(windows: list[Tensor], sink_tokens: int = 1) -> SiteStatistics:
    """Statistics of the positions that a fit includes, as `ModelStatistics` gathers them."""
    statistics, sample, first = SiteStatistics(SHAPE, "basic"), RowSample(4096), RowSample(4096)
    for x in windows:
        positions, seed = torch.arange(len(x)), int(x.double().sum().abs() * 1e6)
        statistics.update(x[8:])
        statistics.keep_rows(x, sample.choose(priorities(seed, positions), positions))
        statistics.keep_first_rows(x[:8], first.choose(priorities(seed, positions[:8]), positions[:8]))
    return statistics.from_position(sink_tokens, sample, first)


def windows(**options: Any) -> list[Tensor]:
    return [window(**options) for _ in range(N_WINDOWS)]


def fitted(statistics: SiteStatistics) -> object:
    return ExactSinksEstimator(inner=INNER).fit(statistics).quantizer


@pytest.mark.parametrize("sink_tokens", [1, 4])
def test_tokens_like_the_first_are_exact_and_no_others(sink_tokens: int) -> None:
    """Positions after the first that are left out, too, are like any other token and move no threshold."""
    quantizer = fitted(gathered(windows(small=4), sink_tokens))
    assert isinstance(quantizer, ExactSinks)
    assert float(quantizer.least_norm) == pytest.approx(10**0.5, rel=0.02)
    x = window(small=5)
    small = x.norm(dim=1) < 2
    assert quantizer.mask(x).tolist() == small.tolist()
    y = quantizer.simulate(x)
    assert torch.equal(y[small], x[small].half().float())
    plain = CodebookEstimator.model_validate(INNER).fit(gathered(windows(small=4), sink_tokens)).quantizer
    assert type(quantizer.inner) is type(plain)
    assert torch.equal(y[~small], quantizer.inner.simulate(x[~small]))


def test_first_positions_that_are_left_out_are_known() -> None:
    own = windows()
    for sink_tokens in (1, 3):
        rows = gathered(own, sink_tokens).start_rows
        assert sorted(rows.tolist()) == sorted(x[0].tolist() for x in own)
    assert not len(gathered(own, 0).start_rows)


@pytest.mark.parametrize(
    ("options", "sink_tokens"),
    [
        pytest.param({"small": 4}, 0, id="no token is left out"),
        pytest.param({"first": 10.5}, 1, id="first tokens are like the others"),
        pytest.param({"first": 40.0}, 1, id="first tokens are larger"),
        pytest.param({"first": 0.0}, 1, id="first tokens are zero"),
        pytest.param({"first": 9.9}, 1, id="nearly as large"),
        pytest.param({"small": 7}, 1, id="more than a sixteenth is small"),
    ],
)
def test_a_site_without_a_class_of_sinks_is_left_alone(options: dict[str, Any], sink_tokens: int) -> None:
    statistics = gathered(windows(**options), sink_tokens)
    alone = CodebookEstimator.model_validate(INNER).fit(statistics)
    found = ExactSinksEstimator(inner=INNER).fit(statistics)
    assert (found.quantizer.spec, found.source) == (alone.quantizer.spec, alone.source)
    assert all(torch.equal(t, alone.quantizer.tensors()[name]) for name, t in found.quantizer.tensors().items())


def test_kept_tokens_cost_at_most_a_bit_a_value() -> None:
    """6 of 99 tokens a window are 0.97 bits, 7 of 99 are 1.13."""
    quantizer = fitted(gathered(windows(small=6)))
    assert isinstance(quantizer, ExactSinks)
    codes = quantizer.encode(window(small=6)[1:])
    assert 0.9 < 8 * codes.tensors["values"].nbytes / (99 * CHANNELS) <= 1


def test_the_order_of_windows_is_of_no_account() -> None:
    own = windows(small=3)
    thresholds = {sink_threshold(gathered(order)) for order in (own, own[::-1], own[3:] + own[:3])}
    assert len(thresholds) == 1
    assert None not in thresholds


def test_norms_that_float16_cannot_hold_are_left_alone() -> None:
    assert sink_threshold(gathered([1e5 * x for x in windows(small=3)])) is None
    assert sink_threshold(gathered([1e3 * x for x in windows(small=3)])) is not None


def test_around_a_prediction_it_tells_what_is_decoded() -> None:
    statistics = gathered(windows(small=4))
    rows, u = statistics.rows, statistics.rows[:, :6] + 0.1 * torch.randn(len(statistics.rows), 6)
    covariance, cross = (torch.cov(torch.cat([u, rows], 1).mT.double())[:6, part] for part in (slice(6), slice(6, 22)))
    statistics.sources = Sources(
        sites=(Site(0, "value"),),
        widths=(6,),
        decoded=u,
        exact=u,
        n_tokens=len(rows),
        mean=u.double().mean(dim=0),
        target_mean=rows.double().mean(dim=0),
        covariance=covariance,
        cross_covariance=cross,
    )
    estimator = ExactSinksEstimator(
        inner={"method": "predicted", "inner": {"method": "entropy_coded", "bits": 2.0, "group_tokens": 16}}
    )
    found, alone = estimator.fit(statistics), estimator.inner.fit(statistics)
    assert found.quantizer.kind == "exact_sinks"
    assert found.quantizer.sources == (Site(0, "value"),)
    assert found.decoded is not None
    assert torch.equal(found.decoded, found.quantizer.simulate(rows, statistics.sources.context))
    assert found.shrinkage == alone.shrinkage is not None
    assert found.priced().steps == alone.priced().steps


def test_what_the_inner_method_needs_is_asked_for() -> None:
    inner = PredictedEstimator(inner={"method": "mixed_codebook", "bits": 2.0})
    outer = ExactSinksEstimator(inner=inner)
    sites = [Site(0, "key", "pre_rope"), Site(0, "value"), Site(1, "key", "pre_rope"), SITE]
    assert outer.sources(SITE, sites) == inner.sources(SITE, sites) != ()
    assert outer.allowance == inner.allowance is not None
    assert (outer.needs_full, outer.needs_fisher) == (True, False)
    with pytest.raises(ValueError, match="the norm of sinks is fitted; calibrate first"):
        outer.dynamic(SHAPE)


def test_it_goes_around_all_other_methods() -> None:
    for outer in ("centred", "exact_sinks", "predicted"):
        entry = {"method": outer, "inner": {"method": "exact_sinks", "inner": INNER}}
        with pytest.raises(RecipeError, match="value: exact_sinks goes around all other methods of a site"):
            Recipe.parse({"name": "own", "key": INNER, "value": entry}, "own")
