"""Estimators: against numpy percentiles and sklearn's k-means, exact for constants, honest about their sources."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.sparse import PercentileSparse, RankSparse, ThresholdSparse
from artifacts.sites import Site
from calib.estimators import CodebookEstimator, Estimator, Fit, IdentityEstimator, Outliers, UniformEstimator
from calib.solvers.kmeans import distortion
from calib.solvers.lloyd import kmeans_lloyd
from calib.statistics.readers import query_energy, query_moment
from calib.statistics.row_sample import RowSample, priorities
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

pytestmark = pytest.mark.shapes

BITS = (2, 3, 4, 5, 8)
CHANNELS = 16
SHAPE = SiteShape(site=Site(0, "key", "pre_rope"), heads=2, head_dim=CHANNELS // 2)
every_width = pytest.mark.parametrize("bits", BITS)


def statistics_of(*batches: Tensor, heads: int = 2, queries: Tensor | None = None) -> SiteStatistics:
    """Statistics of a key site with the given tokens, and a reservoir of at most 1000 of them."""
    channels = batches[0].shape[1]
    shape = SiteShape(site=Site(0, "key", "pre_rope"), heads=heads, head_dim=channels // heads)
    statistics, sample = SiteStatistics(shape, "basic"), RowSample(1000)
    for number, x in enumerate(batches):
        positions = torch.arange(len(x))
        statistics.update(x)
        statistics.keep_rows(x, sample.choose(priorities(number, positions), positions))
    if queries is not None:
        reader = SiteStatistics(SiteShape(site=Site(0, "query", "pre_rope"), heads=heads, head_dim=8), "basic")
        reader.update(queries)
        statistics.query_metric = query_moment(shape, reader)
        statistics.query_energy = query_energy(shape, statistics.query_metric)
    return statistics


def normal(n: int = 2000, channels: int = CHANNELS) -> Tensor:
    """Channels of different spreads and offsets."""
    return torch.randn(n, channels) * torch.linspace(0.1, 5, channels) + torch.linspace(-3, 3, channels)


def error(quantizer: Quantizer, x: Tensor) -> float:
    return float((quantizer.simulate(x) - x).double().square().mean())


# Uniform grids


def naive_uniform(x: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool, whole: bool) -> Tensor:
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (bits - 1) - 1)
        return (x / scale).round().clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) * scale
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round().clamp(0, 2**bits - 1) if whole else -low / scale
    return ((x / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


@every_width
@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "whole_zero_point"])
@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_uniform_is_the_naive_grid(bits: int, kind: str, fraction: float) -> None:
    x = normal()
    options: dict[str, Any] = {} if kind == "asymmetric" else {kind: True}
    outliers = Outliers(fraction=fraction) if fraction else None
    fit = UniformEstimator(bits=bits, outliers=outliers, **options).fit(statistics_of(x))
    low, high = torch.tensor(np.percentile(x.numpy(), [50 * fraction, 100 - 50 * fraction], axis=0))
    assert fit.source == "exact statistics"
    quantizer = fit.quantizer
    if fraction:
        assert isinstance(quantizer, ThresholdSparse)
        torch.testing.assert_close(
            (quantizer.lower, quantizer.upper), (low, high), rtol=1e-6, atol=1e-6, check_dtype=False
        )
        quantizer = quantizer.inner
    expected = naive_uniform(
        x.double(), low.double(), high.double(), bits, symmetric=kind == "symmetric", whole=kind == "whole_zero_point"
    )
    assert isinstance(quantizer, Affine)
    off = (quantizer.simulate(x) - expected).abs() > 1e-5
    step = quantizer.scale.expand_as(x)[off]
    assert off.double().mean() < 1e-3  # ties between two steps
    assert ((quantizer.simulate(x) - expected).abs()[off] <= 1.001 * step).all()


@every_width
def test_uniform_error_is_half_a_step_within_the_range(bits: int) -> None:
    x = normal()
    quantizer = UniformEstimator(bits=bits).fit(statistics_of(x)).quantizer
    assert isinstance(quantizer, Affine)
    assert ((quantizer.simulate(x) - x).abs() <= quantizer.scale / 2 + 1e-5).all()


def test_all_positive_values_far_from_zero_stay_within_half_a_step() -> None:
    x = torch.randn(1000, CHANNELS) * 0.1 + 5
    quantizer = UniformEstimator(bits=2).fit(statistics_of(x)).quantizer
    half = (x.amax(0) - x.amin(0)) / 3 / 2
    assert ((quantizer.simulate(x) - x).abs() <= half + 1e-5).all()


def test_float16_ends_are_rounded_before_the_step() -> None:
    x = normal()
    quantizer = UniformEstimator(bits=4, threshold_dtype="float16").fit(statistics_of(x)).quantizer
    low, high = x.amin(0).half().float(), x.amax(0).half().float()
    assert isinstance(quantizer, Affine)
    assert torch.equal(quantizer.scale, (high - low) / 15)
    assert torch.equal(quantizer.offset, low)


def test_a_range_that_float16_cannot_hold_apart_keeps_its_ends() -> None:
    x = torch.randn(500, CHANNELS) * 0.1 + 1e3  # float16 has steps of 0.5 there
    quantizer = UniformEstimator(bits=4, threshold_dtype="float16").fit(statistics_of(x)).quantizer
    assert (quantizer.simulate(x) - x).abs().max() < 0.5


def test_the_order_of_batches_leaves_no_trace() -> None:
    x = torch.randn(1000, 8)
    wide, narrow = 10 * x[:500], x[500:]
    for estimator in (UniformEstimator(bits=4), CodebookEstimator(bits=3), CodebookEstimator(bits=3, per="token")):
        first = estimator.fit(statistics_of(wide, narrow)).quantizer.tensors()
        last = estimator.fit(statistics_of(narrow, wide)).quantizer.tensors()
        for name, tensor in first.items():
            torch.testing.assert_close(last[name], tensor, rtol=1e-3, atol=1e-6)
    quantizer = UniformEstimator(bits=4).fit(statistics_of(wide, narrow)).quantizer
    torch.testing.assert_close(quantizer.tensors()["scale"], (wide.amax(0) - wide.amin(0)) / 15)


# Constants

ESTIMATORS: dict[str, type[Estimator]] = {"uniform": UniformEstimator, "codebook": CodebookEstimator}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "asymmetric": ("uniform", {}),
    "symmetric": ("uniform", {"symmetric": True}),
    "whole zero point": ("uniform", {"whole_zero_point": True}),
    "one table": ("codebook", {"tables": "site"}),
    "own tables": ("codebook", {"tables": "channel"}),
    "own tables, unpooled": ("codebook", {"tables": "channel", "weights": "none", "pooling": 0}),
}
CONSTANTS = torch.tensor([0.0, 0.1, -3.7])


@every_width
@pytest.mark.parametrize(("method", "options"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    ("outliers", "dtype"),
    [(None, "float32"), (Outliers(fraction=0.02), "float16"), (Outliers(fraction=0.25, rule="rank"), "float32")],
)
def test_constant_channels_reconstruct_exactly(
    method: str, options: dict[str, Any], bits: int, outliers: Outliers | None, dtype: str
) -> None:
    x = normal(200, 4)
    x[:, :3] = CONSTANTS
    estimator = ESTIMATORS[method](bits=bits, outliers=outliers, threshold_dtype=dtype, **options)
    y = estimator.fit(statistics_of(x)).quantizer.simulate(x)
    if options.get("symmetric") and outliers and outliers.rule == "rank":
        # A grid without offset puts every constant at an end of few steps, where rank may choose it for 16 bits.
        assert torch.allclose(y[:, :3], x[:, :3], rtol=2**-11, atol=0)
    else:
        assert torch.equal(y[:, :3], x[:, :3])
    assert torch.isfinite(y).all()


@every_width
@pytest.mark.parametrize(("method", "options"), VARIANTS.values(), ids=VARIANTS)
def test_nothing_but_constants(method: str, options: dict[str, Any], bits: int) -> None:
    x = CONSTANTS.repeat(50, 2)
    assert torch.equal(ESTIMATORS[method](bits=bits, **options).fit(statistics_of(x)).quantizer.simulate(x), x)


@pytest.mark.parametrize("estimator", [UniformEstimator(per="token"), CodebookEstimator(per="token")])
def test_tokens_of_one_value_alone(estimator: Estimator) -> None:
    x = torch.arange(50.0)[:, None].expand(50, CHANNELS).contiguous()
    torch.testing.assert_close(estimator.fit(statistics_of(x)).quantizer.simulate(x), x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("tables", ["site", "channel"])
@pytest.mark.parametrize("outliers", [None, Outliers(fraction=0.02)], ids=["dense", "sparse"])
def test_channels_of_two_values_keep_both(tables: str, outliers: Outliers | None) -> None:
    x = torch.randint(0, 2, (500, CHANNELS)) * torch.logspace(-3, 3, CHANNELS)
    quantizer = CodebookEstimator(bits=2, tables=tables, outliers=outliers).fit(statistics_of(x)).quantizer
    assert ((quantizer.simulate(x) - x).abs() <= 1e-3 * x.amax(0)).all()


# Codebooks


def lloyd(values: np.ndarray, weights: np.ndarray, n_levels: int) -> float:
    """Distortion that sklearn reaches."""
    order = values.argsort()
    problem = torch.from_numpy(values[order])[None], torch.from_numpy(weights[order])[None]
    return distortion(*problem, kmeans_lloyd(*problem, n_levels, n_starts=10)).item()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weights", ["none", "scale2", "query", "query_scale2"])
def test_one_table_minimises_the_weighted_objective(bits: int, weights: str) -> None:
    x, queries = normal(400), torch.randn(400, CHANNELS) * torch.linspace(3, 0.1, CHANNELS)
    x[:, :8] = torch.randn(400, 8).exp() / 2  # another shape on a smaller scale: the weights decide which counts
    statistics = statistics_of(x, queries=queries)
    quantizer = CodebookEstimator(bits=bits, weights=weights).fit(statistics).quantizer
    assert isinstance(quantizer, Codebook)
    half = (x.amax(0) - x.amin(0)) / 2
    torch.testing.assert_close(quantizer.scale, half)
    energy = queries.double().square().mean(0)
    w = {"none": half**0, "scale2": half**2, "query": energy, "query_scale2": energy * half**2}[weights].double()
    ours = float((w * ((quantizer.simulate(x) - x) / half).double().square()).sum())
    a = ((x - quantizer.offset) / half).double()
    assert ours <= 1.001 * lloyd(a.numpy().ravel(), w.expand_as(a).numpy().ravel(), 2**bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_own_tables_minimise_each_channels_error(bits: int) -> None:
    x = normal(1000, 8)
    quantizer = CodebookEstimator(bits=bits, tables="channel", pooling=0).fit(statistics_of(x)).quantizer
    ours = (quantizer.simulate(x) - x).double().square().sum(0)
    for channel in range(8):
        values = x[:, channel].double().numpy()
        assert ours[channel] <= 1.001 * lloyd(values, np.ones_like(values), 2**bits)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("weights", ["none", "scale2"])
def test_a_table_over_token_ranges_minimises_the_weighted_objective(bits: int, weights: str) -> None:
    x = torch.cat([torch.randn(150, CHANNELS).exp(), 4 * torch.randn(150, CHANNELS)])  # two shapes, two scales
    quantizer = CodebookEstimator(bits=bits, per="token", weights=weights).fit(statistics_of(x)).quantizer
    assert isinstance(quantizer, DynamicCodebook)
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    half = ((high - low) / 2).double()
    a = ((x - (high + low) / 2) / half).double()
    w = (half**2 if weights == "scale2" else half**0).expand_as(a)
    nearest = (a[..., None] - quantizer.levels[0].double()).abs().amin(-1)
    assert float((w * nearest**2).sum()) <= 1.001 * lloyd(a.numpy().ravel(), w.numpy().ravel(), 2**bits)


@pytest.mark.parametrize(
    "options", [{}, {"tables": "head"}, {"tables": "channel"}, {"per": "token"}, {"outliers": Outliers(fraction=0.02)}]
)
@pytest.mark.parametrize("weights", ["none", "scale2"])
def test_sklearn_fits_what_the_exact_solver_fits_and_no_better(options: dict[str, Any], weights: str) -> None:
    x = normal(600)
    statistics, given = statistics_of(x), {"bits": 3, "weights": weights, **options}
    exact = CodebookEstimator(**given).fit(statistics)
    drawn = [CodebookEstimator(kmeans="sklearn", random_state=seed, **given).fit(statistics) for seed in (0, 0, 1)]
    assert {fit.source for fit in drawn} == {exact.source}
    codes, again, other = (fit.quantizer.tensors() for fit in drawn)
    assert all(torch.equal(codes[name], again[name]) for name in codes)
    assert any(not torch.equal(codes[name], other[name]) for name in codes)
    assert error(exact.quantizer, x) * 0.8 <= error(drawn[0].quantizer, x) <= error(exact.quantizer, x) * 1.2


def test_what_decides_between_solvers_is_written_only_where_it_is_not_the_exact_one() -> None:
    assert not {"kmeans", "random_state"} & CodebookEstimator().model_dump().keys()
    sklearn = CodebookEstimator(kmeans="sklearn", random_state=3)
    written = sklearn.model_dump_json()
    assert CodebookEstimator.model_validate_json(written) == sklearn
    assert '"kmeans":"sklearn","random_state":3' in written
    with pytest.raises(ValidationError, match="should be 'exact' or 'sklearn'"):
        CodebookEstimator(kmeans="lloyd")  # type: ignore[arg-type]


def test_each_weighting_is_the_best_at_its_own_objective() -> None:
    x = torch.cat([torch.randn(1000, 8) * 5, torch.randn(1000, 8).exp() * 0.1], dim=1)
    queries = torch.randn(500, CHANNELS) * torch.cat([torch.full((8,), 0.02), torch.full((8,), 5.0)])
    statistics = statistics_of(x, queries=queries)
    half, energy = (x.amax(0) - x.amin(0)) / 2, queries.square().mean(0)
    w = {"none": half**-2, "scale2": half**0, "query": energy / half**2, "query_scale2": energy}
    fits = {name: CodebookEstimator(bits=3, weights=name).fit(statistics).quantizer for name in w}
    loss = {(a, b): (w[b] * (fits[a].simulate(x) - x) ** 2).mean() for a in w for b in w}
    for b in w:
        assert min(w, key=lambda a, b=b: loss[a, b]) in {a for a in w if loss[a, b] <= 1.001 * loss[b, b]}
        assert all(loss[b, b] <= 1.001 * loss[a, b] for a in w)
    assert loss["none", "scale2"] > 1.05 * loss["scale2", "scale2"]


def test_query_weights_need_queries() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.key\.pre_rope: weights: query needs a key site"):
        CodebookEstimator(weights="query").fit(statistics_of(normal()))


@pytest.mark.parametrize(
    "estimator",
    [
        UniformEstimator(),
        UniformEstimator(per="token"),
        UniformEstimator(outliers=Outliers()),
        CodebookEstimator(),
        CodebookEstimator(tables="channel"),
        CodebookEstimator(per="token"),
        CodebookEstimator(outliers=Outliers()),
        CodebookEstimator(per="token", outliers=Outliers(rule="rank")),
    ],
)
def test_more_bits_lower_the_error(estimator: Estimator) -> None:
    x = normal(500, 8)
    statistics = statistics_of(x)
    errors = [error(estimator.model_copy(update={"bits": bits}).fit(statistics).quantizer, x) for bits in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_beat_uniform_grids_on_normal_values(bits: int) -> None:
    x = normal()
    statistics = statistics_of(x)
    uniform = error(UniformEstimator(bits=bits).fit(statistics).quantizer, x)
    site = error(CodebookEstimator(bits=bits).fit(statistics).quantizer, x)
    own = error(CodebookEstimator(bits=bits, tables="channel").fit(statistics).quantizer, x)
    assert own < site < uniform


def test_levels_are_in_units_of_the_range_not_of_the_value() -> None:
    """Max's limit for 8 levels is 0.0345 sigma^2; levels applied in the wrong units once gave 13.09 for sigma 3."""
    x = 3 * torch.randn(20_000, 4)
    quantizer = CodebookEstimator(bits=3, tables="channel").fit(statistics_of(x)).quantizer
    assert 0.033 * 9 < error(quantizer, x) < 0.036 * 9


def test_a_channel_too_coarse_for_its_histogram_falls_back_to_the_reservoir() -> None:
    x = torch.randn(1000, CHANNELS)
    x[500, 3] = 1e4
    fit = CodebookEstimator(bits=4, tables="channel", outliers=Outliers(fraction=0.02)).fit(statistics_of(x))
    assert fit.source == "exact statistics; reservoir for 1 channels"
    inner = (fit.quantizer.simulate(x) - x).square().mean(0)
    assert inner[3] < 1.5 * inner[torch.arange(CHANNELS) != 3].max()
    assert "reservoir" not in CodebookEstimator(bits=4).fit(statistics_of(x)).source


def test_a_histogram_lists_what_it_holds() -> None:
    histogram = statistics_of(normal(300)).histogram
    channel, x, counts = histogram.occupied()
    where = histogram.counts.nonzero(as_tuple=True)
    assert torch.equal(channel, where[0])
    assert torch.equal(x, histogram.centers()[where])
    assert torch.equal(counts, histogram.counts[where])


# Outliers


def test_static_thresholds_keep_their_share() -> None:
    x = normal(5000)
    for method in ESTIMATORS.values():
        quantizer = method(bits=3, outliers=Outliers(fraction=0.02)).fit(statistics_of(x)).quantizer
        assert isinstance(quantizer, ThresholdSparse)
        assert abs(quantizer.mask(x).double().mean() - 0.02) < 1e-3


def test_percentiles_beyond_the_tails_come_from_the_histogram() -> None:
    x = normal(30_000, 4)
    fit = UniformEstimator(outliers=Outliers(fraction=0.1)).fit(statistics_of(x))
    assert fit.source == "channel histogram, to half a bin"
    assert isinstance(fit.quantizer, ThresholdSparse)
    expected = torch.tensor(np.percentile(x.numpy(), [5, 95], axis=0))
    width = (x.amax(0) - x.amin(0)) / 512
    for found, right in zip((fit.quantizer.lower, fit.quantizer.upper), expected, strict=True):
        assert ((found - right).abs() <= width).all()


@pytest.mark.parametrize("fraction", [0.01, 0.07])
def test_token_outliers_are_left_out_of_the_table(fraction: float) -> None:
    x = normal(500, 64)
    x[torch.rand(x.shape) < 0.01] *= 20
    fit = CodebookEstimator(bits=3, per="token", outliers=Outliers(fraction=fraction)).fit(statistics_of(x))
    assert fit.source == ("exact statistics" if fraction == 0.01 else "reservoir of 500 tokens")
    assert isinstance(fit.quantizer, PercentileSparse)
    assert fit.quantizer.outlier_fraction == fraction
    assert error(fit.quantizer, x) < 0.5 * error(
        CodebookEstimator(bits=3, per="token").fit(statistics_of(x)).quantizer, x
    )


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, 1), (0.1, 2), (0.15, 2), (0.49, 8)])
@pytest.mark.parametrize("per", ["channel", "token"])
def test_rank_keeps_exactly_so_many_of_each_token(fraction: float, expected: int, per: str) -> None:
    outliers, x = Outliers(fraction=fraction, rule="rank"), normal()
    for method in ESTIMATORS.values():
        quantizer = method(bits=3, per=per, outliers=outliers).fit(statistics_of(x)).quantizer
        assert isinstance(quantizer, RankSparse)
        assert quantizer.outliers_per_token == expected
        assert (quantizer.mask(x).sum(dim=1) == expected).all()


# The rest


def test_identity_keeps_everything() -> None:
    x = normal(50)
    fit = IdentityEstimator().fit(statistics_of(x))
    assert isinstance(fit, Fit)
    assert isinstance(fit.quantizer, Identity)
    assert torch.equal(fit.quantizer.simulate(x), x)
    assert torch.equal(IdentityEstimator().dynamic(SHAPE).simulate(x), x)


def test_dynamic_quantizers_need_no_statistics() -> None:
    x = normal(200)
    for per in ("channel", "token"):
        quantizer = UniformEstimator(bits=8, per=per).dynamic(SHAPE)
        assert isinstance(quantizer, DynamicAffine)
        assert error(quantizer, x) < 1e-2
    assert isinstance(UniformEstimator(per="token", outliers=Outliers()).dynamic(SHAPE), PercentileSparse)
    with pytest.raises(ValueError, match="codebooks are fitted; calibrate first"):
        CodebookEstimator().dynamic(SHAPE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformEstimator(bits=9),
        lambda: UniformEstimator(bits=0),
        lambda: Outliers(fraction=0.5),
        lambda: UniformEstimator(bits=1, symmetric=True),
        lambda: UniformEstimator(symmetric=True, whole_zero_point=True),
        lambda: CodebookEstimator(per="token", tables="channel"),
        lambda: CodebookEstimator(per="token", weights="query"),
        lambda: CodebookEstimator(random_state=1),
        lambda: CodebookEstimator(kmeans="sklearn", levels="normal_float"),
    ],
)
def test_what_does_not_go_together_is_refused_when_built(make: Any) -> None:
    with pytest.raises(ValidationError):
        make()


def test_fitting_is_pure() -> None:
    x = normal()
    statistics = statistics_of(x)
    before = {name: tensor.clone() for name, tensor in statistics.state().items()}
    for estimator in (UniformEstimator(), CodebookEstimator(tables="channel"), CodebookEstimator(per="token")):
        once, again = (estimator.fit(statistics).quantizer.tensors() for _ in range(2))
        assert all(torch.equal(again[name], tensor) for name, tensor in once.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics.state().items())
