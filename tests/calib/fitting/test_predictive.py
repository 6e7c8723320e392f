"""Predictive transform coding: the quantizer, its estimator, chains of sites, budgets, and the model that runs them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import random_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from artifacts.artifact import Artifact, load, save
from artifacts.codes import Codes
from artifacts.errors import MismatchError, NonFiniteError
from artifacts.model.attention import attention_layers, hooked
from artifacts.model.layout import to_rows
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.predicted import Predicted
from artifacts.quantizers.rotated import Rotated
from artifacts.registry import build
from artifacts.sites import Site
from artifacts.spec import QuantSpec
from calib.calibration import add_windows, calibrate, new_statistics
from calib.estimators import Allowance, Fit, PredictedEstimator
from calib.estimators import predicted as predicted_estimator
from calib.estimators.estimator import trial_statistics
from calib.estimators.predicted import NOTHING, NormalEquations, _without, fit_predictor, held_out_shrinkage
from calib.fitting.budget import allocate_bits
from calib.fitting.fit import fit
from calib.recipe.recipe import Recipe, RecipeError, load_recipe, shipped_recipes
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_shape import SiteShape
from calib.statistics.sources import Shrinkage, Sources
from kvgauge.cli.calibrate import parser
from kvgauge.cli.options.common import parsed
from kvgauge.configuration.recipe import RecipeConfig, recipe_changes
from simquant.cache.packed import packed_cache
from simquant.evaluation.attention_inputs import attention_inputs
from simquant.evaluation.site_errors import attention_errors
from simquant.policy.policy import CachePolicy, ResidualWindow
from simquant.simulate import simulate

pytestmark = pytest.mark.shapes

KEY0, VALUE0, KEY1, VALUE1 = (
    Site(0, "key", "pre_rope"),
    Site(0, "value"),
    Site(1, "key", "pre_rope"),
    Site(1, "value"),
)
CHANNELS, WIDTHS = 8, (8, 5)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def affine(bits: int = 3) -> Affine:
    return Affine(
        channels=CHANNELS,
        bits=bits,
        scale=torch.full((CHANNELS,), 4 / 2**bits),
        offset=torch.full((CHANNELS,), -2.0),
    )


def predicted(inner: Quantizer | None = None, rank: int | None = None) -> Predicted:
    weight = torch.randn(sum(WIDTHS), rank or CHANNELS).half()
    return Predicted(
        channels=CHANNELS,
        inner=inner or affine(),
        source_sites=f"{KEY0} {VALUE0}",
        weight=weight,
        bias=torch.linspace(-1, 1, CHANNELS),
        expansion=None if rank is None else torch.randn(rank, CHANNELS).half(),
    )


@pytest.mark.parametrize(("rank", "of_prediction"), [(None, 13 * 8), (2, 13 * 2 + 2 * 8)])
def test_multiply_adds_of_decoding_are_those_of_the_matrices(rank: int | None, of_prediction: int) -> None:
    basis = torch.eye(4).expand(2, 4, 4).contiguous()
    quantizer = predicted(Rotated(channels=CHANNELS, inner=affine(), basis=basis), rank)
    assert quantizer.decode_multiply_adds == CHANNELS + 2 * 4 * 4 + of_prediction


def context(n_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(n_tokens, width).to(dtype) for width in WIDTHS)


def assert_same(one: Codes, other: Codes) -> None:
    for a, b in zip(one.all_tensors(), other.all_tensors(), strict=True):
        assert torch.equal(a, b)


# ---- the quantizer


@pytest.mark.parametrize("rank", [None, 3])
def test_the_prediction_is_the_product_with_both_factors(rank: int | None) -> None:
    quantizer, u = predicted(rank=rank), context(20)
    matrix = quantizer.weight.double()
    if quantizer.expansion is not None:
        matrix = matrix @ quantizer.expansion.double()
    expected = quantizer.bias.double() + torch.cat(u, dim=1).double() @ matrix
    torch.testing.assert_close(quantizer.predict(u).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_left_goes_through_the_inner_quantizer(dtype: torch.dtype) -> None:
    quantizer, u = predicted(), context(20, dtype)
    x = (quantizer.predict(u) + torch.randn(20, CHANNELS)).to(dtype)
    rest = x.float() - quantizer.predict(u)
    y = quantizer.simulate(x, u)
    assert y.dtype == dtype
    assert torch.equal(y, (quantizer.predict(u) + quantizer.inner.simulate(rest)).to(dtype))
    assert torch.equal(y, quantizer.decode(quantizer.encode(x, u), u))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_token_has_the_same_codes_among_any_others(rank: int | None, dtype: torch.dtype) -> None:
    quantizer, u = predicted(rank=rank), context(13, dtype)
    x = (quantizer.predict(u) + torch.randn(13, CHANNELS)).to(dtype)
    whole = quantizer.encode(x, u)
    for sizes in ([1] * 13, [5, 8]):
        cuts = zip(x.split(sizes), *(part.split(sizes) for part in u), strict=True)
        assert_same(Codes.cat([quantizer.encode(part, tuple(own)) for part, *own in cuts]), whole)
    transposed = tuple(part.T.contiguous().T for part in u)
    assert_same(quantizer.encode(x.T.contiguous().T, transposed), whole)


def test_only_the_inner_codes_are_stored_and_no_tokens_are_no_bytes() -> None:
    quantizer, u = predicted(), context(6)
    assert quantizer.encode(torch.randn(6, CHANNELS), u).nbytes == 6 * 3
    empty = quantizer.encode(torch.empty(0, CHANNELS), context(0))
    assert empty.nbytes == 0
    assert quantizer.decode(empty, context(0)).shape == (0, CHANNELS)
    assert quantizer.static_bytes == 13 * 8 * 2 + 8 * 4 + affine().static_bytes


@pytest.mark.parametrize("rank", [None, 3])
def test_specification_and_tensors_rebuild_it(rank: int | None) -> None:
    quantizer, u = predicted(rank=rank).at(KEY1), context(6)
    x = torch.randn(6, CHANNELS)
    spec = QuantSpec.from_json(json.loads(json.dumps(quantizer.spec.to_json())))
    rebuilt = build(spec, quantizer.tensors(), KEY1)
    assert rebuilt.sources == (KEY0, VALUE0)
    assert torch.equal(rebuilt.decode(quantizer.encode(x, u), u), quantizer.simulate(x, u))
    assert torch.equal(quantizer.to(torch.device("cpu")).simulate(x, u), quantizer.simulate(x, u))


def test_another_context_is_refused_by_name() -> None:
    quantizer, x = predicted().at(KEY1), torch.randn(6, CHANNELS)
    good = context(6)
    for wrong in ((), good[:1], context(5), (good[0], good[0])):
        for call in (quantizer.encode, quantizer.simulate):
            with pytest.raises(MismatchError, match=r"^layers\.1\.key\.pre_rope: it is predicted from layers\.0\.key"):
                call(x, wrong)
    with pytest.raises(MismatchError, match="it is predicted from"):
        quantizer.decode(quantizer.encode(x, good), ())


def test_values_that_leave_float32_are_refused() -> None:
    quantizer, u = predicted(), tuple(1e37 * part for part in context(3))
    with pytest.raises(NonFiniteError, match="when their prediction is subtracted"):
        quantizer.encode(torch.full((3, CHANNELS), 3e38), tuple(part * 10 for part in u))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_sites": ""}, "must name sites before"),
        ({"source_sites": "layers.1.value", "site": KEY1}, "must name sites before layers.1.key.pre_rope"),
        ({"source_sites": "layers.0.keys"}, "expected a name such as"),
        ({"weight": torch.full((13, 8), torch.inf).half()}, "weight must be finite; 104 entries"),
        ({"bias": torch.full((8,), torch.nan)}, "bias must be finite"),
    ],
)
def test_settings_are_checked_when_built(change: Mapping[str, object], message: str) -> None:
    """Shapes are checked by annotations first here, and by the quantizer where a file is read."""
    with pytest.raises(ValueError, match=message):
        predicted().replace(**change)


def test_a_place_before_its_sources_is_refused() -> None:
    with pytest.raises(ValueError, match="must name sites before"):
        predicted().at(KEY0)


# ---- the predictor


def sources_of(u: Tensor, x: Tensor, n_rows: int, noise: float = 0.0) -> Sources:
    """All tokens' moments, and the first rows as the reservoir, decoded with some noise."""
    rows = u[:n_rows]
    exact, target = (part.double() for part in (u, x))
    centred = exact - exact.mean(dim=0)
    return Sources(
        sites=(KEY0,),
        widths=(u.shape[1],),
        decoded=rows + noise * torch.randn_like(rows),
        exact=rows,
        n_tokens=len(u),
        mean=exact.mean(dim=0),
        target_mean=target.mean(dim=0),
        covariance=centred.mT @ centred / len(u),
        cross_covariance=centred.mT @ (target - target.mean(dim=0)) / len(u),
    )


def related(n_tokens: int, n_inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs, and targets of which they explain three quarters of the variance."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(n_inputs, CHANNELS, generator=torch.Generator().manual_seed(7)) / n_inputs**0.5
    u = torch.randn(n_tokens, n_inputs, generator=generator) * torch.logspace(0, -1, n_inputs)
    truth /= (torch.logspace(0, -1, n_inputs).square()[:, None] * truth.square()).sum(dim=0).sqrt()
    return u, u @ truth + 0.577 * torch.randn(n_tokens, CHANNELS, generator=generator)


ONES = torch.ones(CHANNELS, dtype=torch.float64)


def predictor(sources: Sources, x: Tensor) -> Tensor:
    return fit_predictor(sources, x, held_out_shrinkage(sources, x, ONES))


def left_over(weight: Tensor, u: Tensor, x: Tensor) -> float:
    """Share of the targets' variance that a predictor leaves."""
    rest = x.double() - u.double() @ weight
    return float(rest.var(dim=0).sum() / x.double().var(dim=0).sum())


def test_with_many_tokens_it_is_least_squares() -> None:
    u, x = related(4000, 12)
    found = predictor(sources_of(u, x, 4000), x)
    centred = (u - u.mean(dim=0)).double()
    expected = torch.linalg.lstsq(centred, (x - x.mean(dim=0)).double()).solution
    fresh_u, fresh_x = related(4000, 12, seed=1)
    assert left_over(found, fresh_u, fresh_x) <= 1.005 * left_over(expected, fresh_u, fresh_x)


@pytest.mark.parametrize(("n_tokens", "n_inputs"), [(24, 40), (60, 60), (300, 40)])
def test_few_tokens_never_make_it_worse_than_no_prediction(n_tokens: int, n_inputs: int) -> None:
    """Where least squares alone would add more noise than it explains."""
    for seed in range(5):
        u, _ = related(n_tokens, n_inputs, seed)
        x = torch.randn(n_tokens, CHANNELS, generator=torch.Generator().manual_seed(100 + seed))
        fresh_u, _ = related(2000, n_inputs, seed + 50)
        fresh_x = torch.randn(2000, CHANNELS, generator=torch.Generator().manual_seed(200 + seed))
        found = predictor(sources_of(u, x, n_tokens), x)
        assert left_over(found, fresh_u, fresh_x) < 1.06


def test_moments_of_all_tokens_help_a_small_reservoir() -> None:
    u, x = related(6000, 60)
    fresh_u, fresh_x = related(4000, 60, seed=1)
    rows = x[:80]
    with_all, alone = (sources_of(*pair, 80, noise=0.02) for pair in ((u, x), (u[:80], rows)))
    shrunk, unaided = (left_over(predictor(s, rows), fresh_u, fresh_x) for s in (with_all, alone))
    assert shrunk < 0.8 * unaided
    assert shrunk < 0.32  # of which 0.25 cannot be predicted


def test_decoded_inputs_count_more_than_exact_ones_where_they_differ() -> None:
    """Inputs with as much noise as signal deserve half the weight; moments before quantization do not know that."""
    u, x = related(20000, 12)
    sources = sources_of(u, x, 4000, noise=1.0)
    fresh_u, fresh_x = related(4000, 12, seed=1)
    fresh_u = fresh_u + torch.randn_like(fresh_u)
    exact = NormalEquations(sources.covariance, sources.cross_covariance).solve(1e-4)
    found = predictor(sources, x[:4000])
    assert left_over(found, fresh_u, fresh_x) < 0.8 * left_over(exact, fresh_u, fresh_x)


def test_tokens_that_judge_are_taken_out_of_the_moments() -> None:
    u, x = related(500, 6)
    sources = sources_of(u, x, 200)
    found = _without(sources, x[:200], 100, 1)
    left = torch.cat([torch.arange(100), torch.arange(200, 500)])
    centred, target = u[left].double() - sources.mean, x[left].double() - sources.target_mean
    torch.testing.assert_close(found.inputs, centred.mT @ centred / 400)
    torch.testing.assert_close(found.cross, centred.mT @ target / 400)


def test_inputs_that_never_change_get_no_weight() -> None:
    u, x = related(400, 6)
    u[:, 2] = 3.0
    found = predictor(sources_of(u, x, 400), x)
    assert torch.isfinite(found).all()
    assert (found[2] == 0).all()


def test_two_tokens_predict_nothing() -> None:
    u, x = related(2, 6)
    assert held_out_shrinkage(sources_of(u, x, 2), x, ONES) == NOTHING


# ---- the estimator

INNER = {"method": "mixed_codebook", "bits": 2.0}


def fitted(estimator: PredictedEstimator, u: Tensor, x: Tensor) -> Fit:
    statistics = trial_statistics(SiteShape(site=KEY1, heads=2, head_dim=CHANNELS // 2)).mapped(x)
    statistics.sources = sources_of(u, x, len(x))
    return estimator.fit(statistics)


def test_a_fit_tells_what_its_quantizer_gives_back() -> None:
    """Found on the way; a chain that asked the quantizer again would predict every token twice more."""
    u, x = related(300, 12)
    found = fitted(PredictedEstimator(inner=INNER), u, x)
    assert found.decoded is not None
    assert torch.equal(found.decoded, found.quantizer.simulate(x, sources_of(u, x, len(x)).context))


def test_prediction_lowers_the_error_at_the_same_bits() -> None:
    u, x = related(3000, 12)
    found = fitted(PredictedEstimator(inner=INNER), u, x).quantizer
    alone = found.replace(weight=torch.zeros_like(found.weight), bias=torch.zeros(CHANNELS))
    plain = PredictedEstimator(inner=INNER).inner.fit(trial_statistics(found_shape()).mapped(x)).quantizer
    fresh_u, fresh_x = related(1000, 12, seed=1)
    error = float((found.simulate(fresh_x, (fresh_u,)) - fresh_x).square().mean())
    assert error < 0.4 * float((plain.simulate(fresh_x) - fresh_x).square().mean())
    assert error < 0.4 * float((alone.simulate(fresh_x, (fresh_u,)) - fresh_x).square().mean())


def found_shape() -> SiteShape:
    return SiteShape(site=KEY1, heads=2, head_dim=CHANNELS // 2)


def test_a_lower_rank_is_the_best_one_of_it() -> None:
    """Against cutting off the singular values of the predictions."""
    u, x = related(2000, 30)
    full, low = (
        fitted(PredictedEstimator(inner=INNER, rank_fraction=share), u, x).quantizer for share in (None, 3 / CHANNELS)
    )
    assert isinstance(low, Predicted)
    assert low.weight.shape == (30, 3)
    whole, cut = ((q.predict((u,)) - q.bias).double() for q in (full, low))
    whole, cut = whole - whole.mean(dim=0), cut - cut.mean(dim=0)
    tail = torch.linalg.svdvals(whole)[3:].square().sum()
    assert float((whole - cut).square().sum()) == pytest.approx(float(tail), rel=0.02)


def test_a_rank_that_would_save_nothing_gives_one_matrix() -> None:
    u, x = related(500, 12)
    assert fitted(PredictedEstimator(inner=INNER, rank_fraction=1.0), u, x).quantizer.expansion is None


@pytest.mark.parametrize(
    ("from_sites", "of_key", "of_value"),
    [
        ("before", (KEY0, VALUE0), (KEY0, VALUE0)),
        ("beside", (), (KEY1,)),
        ("both", (KEY0, VALUE0), (KEY0, VALUE0, KEY1)),
    ],
)
def test_sources_are_the_neighbours_that_are_asked_for(
    from_sites: str, of_key: tuple[Site, ...], of_value: tuple[Site, ...]
) -> None:
    estimator = PredictedEstimator(inner=INNER, from_sites=from_sites)
    sites = [VALUE1, KEY1, VALUE0, KEY0, Site(2, "value")]
    assert estimator.sources(KEY1, sites) == of_key
    assert estimator.sources(VALUE1, sites) == of_value
    assert estimator.sources(KEY0, sites) == ()


# ---- budgets


def asking(slopes: list[float], unit_bits: int = 8) -> tuple[Fit, Allowance]:
    """Levels that bring these distortions per bit, a bit a step, over 16 channels, and what they can be given."""
    fit = Fit(Identity(channels=16), "", tuple((slope, 1.0) for slope in slopes))
    return fit, Allowance(unit_bits=unit_bits, least=0.25, most=8.0)


def test_bytes_go_where_they_save_most() -> None:
    steep, flat = ([scale * 2.0**-n for n in range(64)] for scale in (4096.0, 1.0))
    sites = {KEY0: asking(steep), VALUE0: asking(flat)}
    found = allocate_bits(sites, dict.fromkeys(sites, 1.0), 2.0)
    assert found[KEY0] + found[VALUE0] == 4.0
    assert found[KEY0] - found[VALUE0] == pytest.approx(12 / 16, abs=8 / 16)  # 2^12 is twelve steps of a bit
    weighted = allocate_bits(sites, {KEY0: 1.0, VALUE0: 4096.0}, 2.0)
    assert weighted == {KEY0: 2.0, VALUE0: 2.0}
    finer = {KEY0: asking(steep, unit_bits=1), VALUE0: asking(flat, unit_bits=1)}
    assert allocate_bits(finer, dict.fromkeys(finer, 1.0), 2.0) == {KEY0: 2.375, VALUE0: 1.625}


@pytest.mark.parametrize("target", [0.75, 1.1, 3.0, 8.0])
def test_no_site_gets_less_or_more_than_it_can_be_given(target: float) -> None:
    sites = {KEY0: asking([1.0] * 200), VALUE0: asking([1e-9] * 200, unit_bits=1), KEY1: asking([])}
    found = allocate_bits(sites, dict.fromkeys(sites, 1.0), target)
    assert 3 * target - 1 / 16 < sum(found.values()) <= 3 * target
    assert all(0.25 <= bits <= 8 for bits in found.values())
    assert found[KEY0] == pytest.approx(min(8.0, 3 * target - 0.75), abs=0.5)


# ---- models


def recipe_of(name: str, bits: float, **changes: object) -> Recipe:
    return load_recipe(name).edited({"key": {"bits": bits}, "value": {"bits": bits}, **changes})


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, 64, (8, 64), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Two layers, 4 query heads on 2 KV heads of head_dim 4."""
    return random_llama(hidden_size=16, intermediate_size=32, head_dim=4, initializer_range=0.3)


@pytest.fixture(scope="module")
def statistics(model: LlamaForCausalLM, windows: Tensor) -> ModelStatistics:
    found = new_statistics(model, attention_layers(model), tier="full")
    add_windows(model, attention_layers(model), found, windows)
    return found


@pytest.fixture(scope="module")
def artifact(statistics: ModelStatistics) -> Artifact:
    return fit(statistics, recipe_of("predictive", 2.0))


def test_a_model_reads_what_the_chain_decodes(model: LlamaForCausalLM, artifact: Artifact, windows: Tensor) -> None:
    """Site by site, with tokens that stay exact, which are sources only as they are decoded."""
    assert artifact[VALUE1].sources == (KEY0, VALUE0, KEY1)
    layers = attention_layers(model)
    given: dict[Site, Tensor] = {}
    read: dict[Site, Tensor] = {}
    policy = CachePolicy(sink_tokens=3)
    with (
        torch.no_grad(),
        hooked(layers, {site: keeper(given, site) for site in artifact}),
        simulate(model, artifact, policy=policy, layers=layers) as usage,
        hooked(layers, {site: keeper(read, site) for site in artifact}),
    ):
        model(windows[:2])
    decoded: dict[Site, Tensor] = {}
    for site, quantizer in artifact.items():
        decoded[site] = quantizer.simulate(given[site], tuple(decoded[source] for source in quantizer.sources))
        own, expected, exact = (part[site].view(2, 64, -1) for part in (read, decoded, given))
        assert torch.equal(own[:, 3:], expected[:, 3:])
        assert torch.equal(own[:, :3], exact[:, :3])
        assert usage.sites[site].n_encoded == 2 * 61


def keeper(kept: dict[Site, Tensor], site: Site) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        kept[site] = to_rows(x).clone()

    return keep


def test_errors_of_single_layers_are_those_of_decoded_sources(
    model: LlamaForCausalLM, artifact: Artifact, windows: Tensor
) -> None:
    inputs = attention_inputs(model, attention_layers(model), windows[0])
    decoded: dict[Site, Tensor] = {}
    for site, quantizer in artifact.items():
        rows = to_rows(inputs[site.layer].sites.vectors[site])
        decoded[site] = quantizer.simulate(rows, tuple(decoded[source] for source in quantizer.sources))
    for one in inputs:
        _, value = one.decoded(artifact, 2)
        own = to_rows(value)
        assert torch.equal(own[2:], decoded[Site(one.layer.layer, "value")][2:])
        assert torch.equal(own[:2], to_rows(one.value)[:2])
        assert 0 < attention_errors(one, artifact).relative()["output"] < 1


def test_each_site_is_decoded_once_for_the_errors_of_all_layers(
    model: LlamaForCausalLM, artifact: Artifact, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sites before a layer used to be decoded anew for each of its two sites: quadratic in the layers."""
    inputs, encoded = attention_inputs(model, attention_layers(model), windows[0]), []
    plain = Predicted._encode
    monkeypatch.setattr(
        Predicted, "_encode", lambda self, x, context: encoded.append(self.site) or plain(self, x, context)
    )
    for one in inputs:
        attention_errors(one, artifact)
    assert sorted(encoded) == sorted(site for site, own in artifact.items() if own.sources)


def test_no_token_sees_later_ones(model: LlamaForCausalLM, artifact: Artifact, windows: Tensor) -> None:
    with torch.no_grad(), simulate(model, artifact):
        whole, part = model(windows[:1]).logits, model(windows[:1, :20]).logits
    torch.testing.assert_close(whole[:, :20], part, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["predictive", "predictive-lowrank"])
def test_an_artifact_is_the_same_after_saving(name: str, statistics: ModelStatistics, tmp_path: Path) -> None:
    artifact = fit(statistics, load_recipe(name))
    save(artifact, tmp_path / "q.safetensors")
    again = load(tmp_path / "q.safetensors")
    assert again.digest == artifact.digest
    assert again[KEY1].sources == (KEY0, VALUE0)
    assert ("expansion" in again[KEY1].tensors()) == ("lowrank" in name)


def test_moments_between_sites_are_missed_by_name(model: LlamaForCausalLM, windows: Tensor) -> None:
    basic = new_statistics(model, attention_layers(model))
    add_windows(model, attention_layers(model), basic, windows[:1])
    with pytest.raises(ValueError, match=r"tier basic lack\. Calibrate again with --statistics full"):
        fit(basic, load_recipe("predictive"))


def test_a_cache_refuses_what_it_cannot_keep(model: LlamaForCausalLM, artifact: Artifact, windows: Tensor) -> None:
    with (
        pytest.raises(MismatchError, match="Use one window for keys and values"),
        packed_cache(model, artifact, policy=CachePolicy(values=ResidualWindow(residual_tokens=3))),
    ):
        pass


def test_sources_without_a_quantizer_are_refused(model: LlamaForCausalLM, artifact: Artifact, windows: Tensor) -> None:
    astray = artifact[KEY1].replace(source_sites="layers.0.key.post_rope layers.0.value")
    with (
        pytest.raises(MismatchError, match=r"its source layers\.0\.key\.post_rope; got none"),
        simulate(model, {**artifact, KEY1: astray}),
    ):
        pass


@pytest.mark.parametrize("name", ["predictive", "eigen"])
def test_a_budget_is_met_in_stored_bytes(
    name: str, model: LlamaForCausalLM, statistics: ModelStatistics, windows: Tensor
) -> None:
    artifact = fit(statistics, load_recipe(name).edited({"target_bits": 1.5}))
    with torch.no_grad(), simulate(model, artifact) as usage:
        model(windows[:1])
    assert 1.5 - 8 / 8 / 4 <= usage.average_bits <= 1.5


def test_a_budget_is_for_sites_that_allot_levels(statistics: ModelStatistics) -> None:
    with pytest.raises(RecipeError, match="target_bits allocates bits; key needs an entry with method: mixed_codebook"):
        load_recipe("kvquant-3").edited({"target_bits": 2.0})
    exact = load_recipe("predictive").edited({"target_bits": 2.0, "exclude": ["layers.0.key*"]})
    with pytest.raises(RecipeError, match=r"layers\.0\.key\.pre_rope: target_bits"):
        fit(statistics, exact)
    with pytest.raises(RecipeError, match=r"layers\.0\.key\.pre_rope: target_bits must be from 0\.25 to 8"):
        fit(statistics, load_recipe("predictive").edited({"target_bits": 0.2}))


def test_streams_share_a_budget_by_nearly_one_step(statistics: ModelStatistics) -> None:
    """As wide for every site, in shares of what its tokens vary by: then the last bit saves as much anywhere."""
    coded = {"inner": {"inner": {"method": "entropy_coded", "bits": 1.0}}}
    artifact = fit(statistics, load_recipe("predictive").edited({"key": coded, "value": coded, "target_bits": 1.5}))
    bits = torch.tensor([q.spec.bits for q in artifact.values()])
    assert float(bits.mean()) == pytest.approx(1.5, abs=0.15)
    assert float(bits.max() - bits.min()) > 0.05


def test_shrinkage_is_chosen_once_for_a_budget(statistics: ModelStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as all else, and once was chosen anew for every number of bits."""
    chosen: list[Shrinkage] = []

    def choose(*given: Any) -> Shrinkage:
        chosen.append(held_out_shrinkage(*given))
        return chosen[-1]

    monkeypatch.setattr(predicted_estimator, "held_out_shrinkage", choose)
    artifact = fit(statistics, load_recipe("predictive").edited({"target_bits": 1.5, "sink_tokens": 0}))
    assert len(chosen) == sum(bool(quantizer.sources) for quantizer in artifact.values())


def total_error(artifact: Artifact, rows: Mapping[Site, Tensor]) -> float:
    """Mean over sites of the squared error over the variance, sources decoded."""
    decoded: dict[Site, Tensor] = {}
    for site, quantizer in artifact.items():
        decoded[site] = quantizer.simulate(rows[site], tuple(decoded[source] for source in quantizer.sources))
    shares = [(decoded[s] - x).square().mean() / x.var(dim=0).mean() for s, x in rows.items()]
    return float(torch.stack(shares).mean())


def test_few_windows_never_make_it_worse_than_no_prediction(model: LlamaForCausalLM, windows: Tensor) -> None:
    """On tokens that neither has seen; without predictors the same rotations and levels."""
    layers, rows = attention_layers(model), dict[Site, Tensor]()
    few = new_statistics(model, layers, tier="full")
    add_windows(model, layers, few, windows[:1, :32])
    recipe = recipe_of("predictive", 2.0).edited({"sink_tokens": 0})
    plain = recipe.edited(
        {tensor: getattr(recipe, tensor).inner.model_dump(mode="json") for tensor in ("key", "value")}
    )
    artifacts = [fit(few, one) for one in (recipe, plain)]
    with torch.no_grad(), hooked(layers, {site: keeper(rows, site) for site in artifacts[0]}):
        model(windows[1:])
    with_prediction, without = (total_error(artifact, rows) for artifact in artifacts)
    assert with_prediction < 1.05 * without


def test_predictors_do_not_depend_on_the_order_of_windows(
    model: LlamaForCausalLM, artifact: Artifact, windows: Tensor
) -> None:
    other = calibrate(model, windows.flip(0), recipe_of("predictive", 2.0))
    torch.testing.assert_close(other[KEY1].weight, artifact[KEY1].weight, rtol=1e-2, atol=1e-3)


def test_recipes_that_read_moments_between_sites_say_so() -> None:
    """So that `calibrate` takes them unasked, as in the test above."""
    reading = {name for name in shipped_recipes() if load_recipe(name).needs_full}
    assert {"predictive", "predictive-lowrank", "predictive-fisher"} <= reading
    assert not reading & {"default", "eigen", "eigen-fisher", "kvquant-2-1pct"}


def test_the_budget_is_an_option_of_the_command_line() -> None:
    config = parsed(RecipeConfig, parser().parse_args(["--target-bits", "1.25"]))
    base = load_recipe("predictive")
    changes = recipe_changes(config, base.model_dump(mode="json"))
    assert base.edited(changes) == base.edited({"target_bits": 1.25}) != base
