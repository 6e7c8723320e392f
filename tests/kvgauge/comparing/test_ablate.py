"""Ablations: each ingredient is removed wholly and nothing else with it, and its worth is a paired difference."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from helpers.programs import prose, save_model, save_tokenizer

from artifacts.artifact import Artifact
from calib.fitting.fit import fit
from calib.recipe.recipe import Recipe, RecipeError, load_recipe, shipped_recipes
from kvgauge.cli import ablate as ablate_program
from kvgauge.comparing.ablation import INGREDIENTS, Setup
from kvgauge.comparing.ablation_run import Ablation, ablate
from kvgauge.sweeping.cell import Cell
from kvgauge.sweeping.gathering import Gathering
from kvgauge.sweeping.settings import Settings
from kvgauge.sweeping.tasks import Bench
from simquant import CachePolicy, evaluate

WINDOWED = Settings(protocol="decode", residual_tokens=4)

BOX = {"method": "uniform", "bits": 4, "per": "token"}


def without(ingredient: str, recipe: Recipe, settings: Settings = WINDOWED) -> Recipe | None:
    found = INGREDIENTS[ingredient](Setup(recipe, settings))
    return None if found is None else found.recipe


def recipe_of(**entries: Any) -> Recipe:
    return Recipe.parse({"name": "own", "key": BOX, "value": BOX, **entries}, "own")


def values(recipe: Recipe, name: str) -> set[Any]:
    """What stands under a name anywhere in the recipe."""

    def walk(node: Any) -> list[Any]:
        if isinstance(node, dict):
            own = [value for key, value in node.items() if key == name]
            return own + [found for value in node.values() for found in walk(value)]
        return [found for value in node for found in walk(value)] if isinstance(node, list) else []

    return {json.dumps(value) for value in walk(recipe.model_dump(mode="json"))}


# --- one ingredient at a time


@pytest.mark.parametrize(
    ("ingredient", "shipped", "name", "gone"),
    [
        ("sinks", "kvquant-2-1pct-sink", "sink_tokens", "1"),
        ("sinks", "default", "sink_tokens", '"auto"'),
        ("outliers", "kvquant-2-1pct", "outliers", '{"fraction": 0.01, "rule": "percentile"}'),
        ("outliers", "kvquant-3-compact", "method", '"compact_sparse"'),
        ("rotation", "eigen", "method", '"rotated"'),
        ("rotation", "turboquant-2", "method", '"hadamard"'),
        ("weights", "kvquant-2", "weights", '"query"'),
        ("weights", "kvquant-2-1pct-fisher", "weights", '"fisher_scale2"'),
        ("weights", "eigen", "tokens", '"score"'),
        ("weights", "skvq-2", "range", '"attention"'),
        ("pre_rope", "kvquant", "stage", '"pre_rope"'),
        ("pooling", "eigen", "pooling", "1.0"),
        ("pooling", "default", "pooling", "0.1"),
        ("correction", "turboquant-2", "correct", "true"),
        ("correction", "kvquant-2-1pct-qnorm", "qnorm", "true"),
        ("clipping", "quarot-4", "clip_ratio", "0.95"),
        ("allotment", "eigen", "method", '"mixed_codebook"'),
        ("prediction", "predictive", "method", '"predicted"'),
    ],
)
def test_an_ingredient_of_a_shipped_recipe_is_gone_everywhere(
    ingredient: str, shipped: str, name: str, gone: str
) -> None:
    recipe = load_recipe(shipped)
    removed = without(ingredient, recipe)
    assert removed is not None
    assert gone in values(recipe, name)
    if (ingredient, shipped) != ("pooling", "default"):  # its values have one table, in which pooling has no say
        assert gone not in values(removed, name)


@pytest.mark.parametrize("shipped", shipped_recipes())
def test_what_was_removed_is_absent_and_the_rest_is_as_it_was(shipped: str) -> None:
    full = Setup(load_recipe(shipped), WINDOWED)
    for name, remove in INGREDIENTS.items():
        removed = remove(full)
        if removed is None:
            continue
        assert removed != full
        assert remove(removed) is None, name
        others = {other for other, own in INGREDIENTS.items() if own(full) is None and own(removed) is not None}
        assert not others, f"removing {name} brings {others}"


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_a_plain_recipe_has_none(ingredient: str) -> None:
    plain = recipe_of(stage="post_rope")
    assert without(ingredient, plain, Settings()) is None


def test_ingredients_inside_others_and_in_overrides_are_found() -> None:
    sparse = {**BOX, "outliers": {"fraction": 0.1}}
    nested = {"method": "centred", "inner": {"method": "hadamard", "inner": sparse}}
    recipe = recipe_of(key=nested, overrides=[{"layers": [0], "value": sparse}])
    assert without("centring", recipe).key == recipe.key.inner
    assert without("rotation", recipe).key.inner == recipe.key.inner.inner
    removed = without("outliers", recipe)
    assert values(removed, "outliers") == {"null"}
    around = recipe_of(value={"method": "exact_sinks", "inner": nested})
    assert without("exact_sinks", around).value == around.value.inner
    assert removed.key.inner.inner.bits == 4
    assert without("overrides", recipe) == recipe.edited({"overrides": []})


def test_weights_without_a_say_are_absent() -> None:
    table = {"method": "codebook", "bits": 2, "per": "channel", "tables": "channel", "weights": "query"}
    assert without("weights", recipe_of(key=table)) is None
    assert without("weights", recipe_of(key={**table, "tables": "site"})) is not None
    assert without("weights", recipe_of(key={**table, "weights": "fisher"})) is not None
    assert without("weights", load_recipe("kvquant-4-nf")) is None


def test_equal_levels_have_no_fewer_bits_than_those_that_were_allotted() -> None:
    recipe = load_recipe("eigen")
    assert without("allotment", recipe).key.inner.bits == math.ceil(recipe.key.inner.bits)


def test_a_shared_budget_is_given_to_every_site_alike() -> None:
    shared = load_recipe("eigen").edited({"target_bits": 2.25})
    unshared = without("budget", shared)
    assert (unshared.target_bits, unshared.key.inner.bits, unshared.value.inner.inner.bits) == (None, 2.25, 2.25)
    plain = without("allotment", shared)
    assert (plain.target_bits, plain.key.inner.method, plain.key.inner.bits) == (None, "codebook", 3)


def test_a_window_of_the_options_or_of_the_recipe_is_removed_with_what_else_the_recipe_says() -> None:
    plain = Setup(load_recipe("kvquant"), WINDOWED)
    assert INGREDIENTS["window"](plain).settings == Settings(protocol="decode")
    assert INGREDIENTS["window"](Setup(plain.recipe, Settings())) is None
    own = recipe_of(cache={"residual_tokens": 8, "exact_prefill": True, "keep_smallest_norm": 2})
    removed = INGREDIENTS["window"](Setup(own, Settings(protocol="decode")))
    assert removed.recipe.cache is None
    assert (removed.settings.exact_prefill, removed.settings.keep_smallest_norm) == (True, 2)
    assert INGREDIENTS["window"](Setup(own, Settings())) is None


# --- what it is worth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes, and two texts."""
    path = tmp_path_factory.mktemp("ablation")
    save_model(path / "model")
    save_tokenizer(path / "model")
    for seed, name in enumerate(("a.txt", "b.txt")):
        (path / name).write_text(prose(seed, 100))
    return path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


SETTINGS = Settings(dataset="b.txt", calibration_dataset="a.txt", nsamples=2, seqlen=32, limit=4, batch_size=4)


def measured(recipe: Recipe, settings: Settings, *ingredients: str) -> Ablation:
    return ablate(Setup(recipe, settings), "model", ingredients or list(INGREDIENTS))


def test_worth_is_the_paired_difference_over_windows(here: Path) -> None:
    recipe = recipe_of(key={**BOX, "bits": 2, "outliers": {"fraction": 0.2}}, sink_tokens=2)
    found = measured(recipe, SETTINGS, "outliers", "sinks")
    source = Gathering("model", SETTINGS, "pre_rope")
    statistics = source.gather()
    for worth in found.worths:
        losses = []
        for own in (recipe, without(worth.ingredient, recipe)):
            cell = Cell(model="model", recipe=own, task="perplexity", settings=SETTINGS)
            bench = Bench(cell, source.load_model(), fit(statistics, own))
            results = [
                evaluate(bench.loaded.model, window[None], bench.artifact, **bench.protocol())
                for window in bench.windows()
            ]
            losses.append([result.loss_nats for result in results])
        differences = [b - a for a, b in zip(*losses, strict=True)]
        assert worth.nats == pytest.approx(sum(differences) / 4, abs=1e-6)
        assert worth.stderr == pytest.approx(stdev(differences) / 2, abs=1e-6)
        assert worth.bits == pytest.approx(results[0].bits["average"])
        assert worth.bits < found.full.bits["average"]


def test_as_many_first_tokens_are_exact_as_were_chosen(here: Path) -> None:
    recipe, source = recipe_of(sink_tokens="auto"), Gathering("model", SETTINGS, "pre_rope")
    fitted = fit(source.gather(), recipe)
    chosen = Artifact(dict(fitted), replace(fitted.manifest, sink_tokens=2))
    cell = Cell(model="model", recipe=recipe, task="perplexity", settings=SETTINGS)
    assert Bench(cell, source.load_model(), chosen).protocol()["policy"] == CachePolicy(sink_tokens=2)


def test_each_is_measured_under_its_own_policy_and_stage(here: Path) -> None:
    settings = SETTINGS.model_copy(update={"protocol": "decode", "residual_tokens": 8})
    found = measured(recipe_of(sink_tokens=1), settings)
    by_name = {worth.ingredient: worth for worth in found.worths}
    assert list(by_name) == list(INGREDIENTS)
    bits = {name: worth.bits for name, worth in by_name.items() if worth.why_not is None}
    assert set(bits) == {"sinks", "window", "pre_rope"}
    assert bits["window"] < bits["sinks"] < found.full.bits["average"] == bits["pre_rope"]
    assert by_name["window"].nats != 0 != by_name["pre_rope"].nats
    assert {worth.why_not for name, worth in by_name.items() if name not in bits} == {"absent"}


def test_what_cannot_be_removed_is_said(here: Path) -> None:
    rotated = {"method": "hadamard", "inner": {"method": "uniform", "bits": 2, "per": "head", "static": False}}
    recipe = recipe_of(key=rotated, overrides=[{"layers": [0], "key": {"inner": {"bits": 8}}}])
    with pytest.raises(RecipeError):
        INGREDIENTS["rotation"](Setup(recipe, SETTINGS))
    found = measured(recipe, SETTINGS, "rotation", "overrides")
    rotation, overrides = found.worths
    assert "cannot be removed" in str(rotation.why_not)
    assert overrides.nats is not None
    assert "- rotation: cannot be removed" in found.table()


# --- the program


@pytest.fixture
def program(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    """Runs it; returns its status, what it printed, and what it said."""

    def call(more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        common = "--dataset b.txt --calibration-dataset a.txt --nsamples 2 --seqlen 32 --limit 2 --output"
        status = ablate_program.main([*more.split(), *common.split(), str(tmp_path)])
        return status, *capsys.readouterr()

    return call


def test_the_program_reports_in_words_and_figures(
    program: Callable[[str], tuple[int, str, str]], tmp_path: Path
) -> None:
    status, out, _ = program("kvquant-2-1pct model --ingredients outliers,sinks,weights")
    assert status == 0
    assert (tmp_path / "ablation.md").read_text() == out
    found = json.loads((tmp_path / "ablation.json").read_text())
    outliers, sinks, weights = found["ingredients"]
    assert f"{outliers['nats']:+.5f} ± {outliers['stderr']:.5f}" in out
    assert outliers["bits"] < found["full"]["bits"]["average"] == pytest.approx(weights["bits"], abs=0.1)
    assert sinks["why_not"] == "absent"
    assert "- sinks: absent" in out
    assert found["recipe"]["name"] == "kvquant-2-1pct"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("kvquant model --ingredients outlier", 2, "Did you mean outliers?"),
        ("kvqant model", 1, "Did you mean kvquant?"),
        ("kvquant model --residual-tokens 4", 2, "use protocol: decode"),
        (
            "kvquant model --protocol cache --prefill-tokens 20 --method H2O --max-capacity-prompt 12 --window-size 4",
            2,
            "no effect in ablate",
        ),
    ],
)
def test_what_the_program_refuses(
    options: str, status: int, message: str, program: Callable[[str], tuple[int, str, str]]
) -> None:
    found, _, said = program(options)
    assert found == status
    assert message in said
