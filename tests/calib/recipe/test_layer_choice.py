"""Which estimator each site gets: globs, overrides, and refusals before a model runs."""

from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import calib
from artifacts.model.attention import attention_layers
from artifacts.sites import Site
from calib.calibration import add_windows, new_statistics
from calib.capture import site_shapes
from calib.estimators import CodebookEstimator, IdentityEstimator, UniformEstimator
from calib.fitting.fit import fit
from calib.recipe.layer_choice import _check, check, resolve
from calib.recipe.patterns import names
from calib.recipe.recipe import Recipe, RecipeError, load_recipe
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_shape import SiteShape
from kvgauge.cli import calibrate
from kvgauge.terminal.outputs import default_output

GRID = {"method": "uniform", "bits": 4}
WINDOWS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))


def shapes(n_layers: int, *, modules: bool = True) -> list[SiteShape]:
    """The sites of a model."""
    found = []
    for layer in range(n_layers):
        path = f"model.layers.{layer}.self_attn" if modules else ""
        for site in (Site(layer, "key", "pre_rope"), Site(layer, "value"), Site(layer, "query", "pre_rope")):
            found.append(SiteShape(site=site, heads=2, head_dim=8, module=path))
    return found


def recipe(**entries: Any) -> Recipe:
    """4-bit grids with some entries changed."""
    return Recipe.parse({"name": "r", "key": GRID, "value": GRID, **entries}, "r")


def quantized(n_layers: int = 4, **entries: Any) -> list[str]:
    """The sites that do not stay exact."""
    found = resolve(recipe(**entries), shapes(n_layers))
    assert list(found) == [shape.site for shape in shapes(n_layers) if shape.site.tensor != "query"]
    return [str(site) for site, estimator in found.items() if estimator != IdentityEstimator()]


def bits(n_layers: int, *overrides: dict[str, Any], tensor: str = "key") -> list[int]:
    """Bits of the keys or values, layer by layer; 16 where they are exact."""
    found = resolve(recipe(overrides=list(overrides)), shapes(n_layers))
    return [getattr(estimator, "bits", 16) for site, estimator in found.items() if site.tensor == tensor]


# Globs


def test_without_a_choice_every_key_and_value_is_quantized() -> None:
    assert len(quantized(3)) == 6


@pytest.mark.parametrize("pattern", ["model.layers.1.self_attn", "layers.1", "*.1.self_*", "layers.[1]", "*s.{1,9}"])
def test_a_layer_is_named_by_its_module_or_its_number(pattern: str) -> None:
    both = ["layers.1.key.pre_rope", "layers.1.value"]
    assert quantized(2, include=pattern) == both
    assert quantized(3, exclude=["layers.{0,2}"]) == both


def test_a_site_is_named_by_itself() -> None:
    assert quantized(2, include=["layers.0.key.pre_rope", "*.value"], exclude="layers.1.value") == [
        "layers.0.key.pre_rope",
        "layers.0.value",
    ]


def test_braces_count() -> None:
    assert quantized(12, include="*.{2..10}.self_attn", exclude=["layers.{4..10}", "*.key.*"]) == [
        "layers.2.value",
        "layers.3.value",
    ]


def test_patterns_mean_whole_names_in_their_own_case() -> None:
    for pattern in ("layers", "ayers.0", "Layers.0", "self_attn"):
        with pytest.raises(RecipeError, match=f"include: no site matches '{pattern}'"):
            quantized(2, include=pattern)


@pytest.mark.parametrize("seed", range(5))
def test_sites_are_included_and_not_excluded(seed: int) -> None:
    draw = np.random.default_rng(seed)
    numbers = ["0", "1", "?", "[0-2]", "*3", "*"]
    kinds = ["layers.{}", "layers.{}.key.*", "layers.{}.value", "*.{}.self_attn", "layers.{}.*"]
    include, exclude = ([str(draw.choice(kinds)).format(draw.choice(numbers)) for _ in range(3)] for _ in range(2))

    def named(patterns: list[str], shape: SiteShape) -> bool:
        return any(fnmatchcase(name, pattern) for name in names(shape) for pattern in patterns)

    cached = [shape for shape in shapes(4) if shape.site.tensor != "query"]
    expected = [str(shape.site) for shape in cached if named(include, shape) and not named(exclude, shape)]
    if expected:
        assert quantized(4, include=include, exclude=exclude) == expected
    else:
        with pytest.raises(RecipeError, match="exclude removes every site"):
            quantized(4, include=include, exclude=exclude)


@pytest.mark.parametrize("entry", ["include", "exclude"])
def test_a_pattern_that_names_nothing_is_refused(entry: str) -> None:
    message = (
        rf"recipe r: {entry}: no site matches 'model\.layer\.0\.self_attn'; names are such as "
        r"model\.layers\.0\.self_attn, layers\.0, layers\.0\.key\.pre_rope\. Did you mean model\.layers\.0\.self_attn\?"
    )
    with pytest.raises(RecipeError, match=message):
        quantized(2, **{entry: ["*", "model.layer.0.self_attn"] if entry == "include" else ["model.layer.0.self_attn"]})


def test_statistics_that_do_not_know_the_modules_know_the_layers() -> None:
    bare = shapes(2, modules=False)
    assert len(resolve(recipe(include="layers.0"), bare)) == 4
    with pytest.raises(RecipeError, match=r"names are such as layers\.0, layers\.0\.key\.pre_rope, layers\.0\."):
        resolve(recipe(include="model.layers.0.self_attn"), bare)


# Overrides


def test_layers_count_from_either_end() -> None:
    assert bits(4, {"layers": [0, -1], "key": {"bits": 8}}) == [8, 4, 4, 8]
    assert bits(4, {"layers": [0, -1], "key": {"bits": 8}}, tensor="value") == [4, 4, 4, 4]
    assert bits(1, {"layers": [0, -1], "key": {"bits": 8}}) == [8]


def test_a_later_override_wins_and_leaves_the_rest() -> None:
    first = {"sites": "*", "key": {"bits": 8, "symmetric": True}}
    found = resolve(recipe(overrides=[first, {"layers": [1], "key": {"bits": 2}}]), shapes(2))
    assert found[Site(0, "key", "pre_rope")] == UniformEstimator(bits=8, symmetric=True)
    assert found[Site(1, "key", "pre_rope")] == UniformEstimator(bits=2, symmetric=True)


def test_sixteen_bits_are_exact() -> None:
    assert bits(3, {"layers": [1], "key": {"bits": 16}, "value": {"bits": 16}}) == [4, 16, 4]
    assert bits(3, {"layers": [1], "key": {"bits": 16}}, tensor="value") == [4, 4, 4]


def test_an_override_can_take_another_method() -> None:
    found = resolve(recipe(overrides=[{"sites": "layers.1.*", "key": {"method": "codebook", "bits": 3}}]), shapes(2))
    assert found[Site(1, "key", "pre_rope")] == CodebookEstimator(bits=3)
    assert found[Site(1, "value")] == found[Site(0, "key", "pre_rope")] == UniformEstimator(bits=4)


def test_what_is_not_included_stays_exact_whatever_an_override_says() -> None:
    override = {"layers": [0], "key": {"bits": 8}}
    assert quantized(2, exclude="layers.0", overrides=[override]) == ["layers.1.key.pre_rope", "layers.1.value"]


@pytest.mark.parametrize("where", [{"layers": [0, 1, -1]}, {"sites": ["*"]}])
def test_an_override_of_nothing_changes_nothing(where: dict[str, Any]) -> None:
    nothing = recipe(overrides=[{**where, "key": {}, "value": {}}])
    assert resolve(nothing, shapes(3)) == resolve(recipe(), shapes(3))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"layers": [4], "key": {}}, r"overrides\.0\.layers: expected layers 0 to 3, or -1 to -4 .* got 4; use 3"),
        ({"layers": [0, -5], "key": {}}, r"overrides\.0\.layers: expected layers .* got -5; use -4"),
        (
            {"sites": ["*", "layer.0"], "key": {}},
            r"overrides\.0\.sites: no site matches 'layer\.0'; .* Did you mean l",
        ),
        ({"sites": "*.key.*", "value": {}}, r"overrides\.0: \*\.key\.\* matches no values"),
    ],
)
def test_overrides_of_layers_that_there_are_not_are_refused(override: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe r: {message}"):
        bits(4, override)


# Shapes


def test_what_does_not_go_with_a_shape_is_refused_with_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def reject(self: UniformEstimator, shape: SiteShape) -> None:
        seen.append(f"{self.bits} bits {shape.site}")
        if shape.head_dim % self.bits:
            raise ValueError(f"{self.bits} bits do not divide {shape.head_dim}; use 4")

    monkeypatch.setattr(UniformEstimator, "check", reject)
    _check.cache_clear()
    assert check(recipe(), shapes(2)) == check(recipe(), shapes(2)) == resolve(recipe(), shapes(2))
    assert seen == ["4 bits layers.0.key.pre_rope", "4 bits layers.0.value"]  # sites that are alike are looked at once
    odd = recipe(overrides=[{"layers": [1], "value": {"bits": 3}}])
    with pytest.raises(RecipeError, match=r"recipe r: layers\.1\.value: 3 bits do not divide 8; use 4"):
        check(odd, shapes(2))


def test_the_site_is_named_once_and_is_the_one() -> None:
    wrong = recipe(overrides=[{"layers": [1], "value": {"method": "codebook", "weights": "query"}}])
    with pytest.raises(RecipeError, match=r"recipe r: layers\.1\.value: weights: query needs a key site"):
        check(wrong, shapes(2))


def test_an_impossible_recipe_is_refused_before_the_model_runs(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("calib.calibration.add_windows", never)
    with pytest.raises(RecipeError, match="expected layers 0 to 1"):
        calib.calibrate(tiny_llama, WINDOWS, recipe(overrides=[{"layers": [2], "key": {}}]))


@pytest.mark.parametrize("head_dim", [32, 80, 96, 128, 256])
@pytest.mark.parametrize("name", ["eigen-entropy", "predictive-fisher-entropy"])
def test_a_single_head_is_a_shape_like_any_other(name: str, head_dim: int) -> None:
    """The check of the shape once never came back: few made-up tokens, and gradients that leave half of them zero."""
    recipe = load_recipe(name)
    one = [
        SiteShape(site=site, heads=1, head_dim=head_dim) for site in (Site(0, "key", recipe.stage), Site(0, "value"))
    ]
    assert len(check(recipe, one)) == 2


# Fits


def test_the_modules_of_a_model_are_known(tiny_llama: LlamaForCausalLM) -> None:
    found = site_shapes(attention_layers(tiny_llama), "pre_rope")
    assert [shape.module for shape in found] == [f"model.layers.{layer}.self_attn" for layer in (0, 0, 0, 1, 1, 1)]


def test_layers_are_fitted_as_they_are_chosen(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    layers = attention_layers(tiny_llama)
    statistics = new_statistics(tiny_llama, layers)
    add_windows(tiny_llama, layers, statistics, WINDOWS)
    statistics.save(tmp_path / "s.safetensors")
    chosen = recipe(exclude="model.layers.0.self_attn", overrides=[{"layers": [-1], "value": {"bits": 2}}])
    artifact = fit(ModelStatistics.load(tmp_path / "s.safetensors"), chosen)
    plain = fit(statistics, recipe())
    x = torch.randn(10, 16)
    for site in (Site(0, "key", "pre_rope"), Site(0, "value")):
        assert torch.equal(artifact[site].simulate(x), x)
        assert not torch.equal(plain[site].simulate(x), x)
    key, value = Site(1, "key", "pre_rope"), Site(1, "value")
    assert torch.equal(artifact[key].simulate(x), plain[key].simulate(x))
    assert artifact[value].spec.bits == 2
    assert Recipe.parse(dict(artifact.manifest.recipe), "manifest") == chosen


def test_a_recipe_needs_gradients_if_any_of_its_entries_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CodebookEstimator, "needs_fisher", True)
    assert not recipe().needs_fisher
    assert recipe(value={"method": "codebook"}).needs_fisher
    assert recipe(overrides=[{"layers": [3], "key": {"method": "codebook"}}]).needs_fisher


# Programs


def test_the_listing_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate.main(["--list-recipes"]) == 0
    rows = capsys.readouterr().out.splitlines()
    sources = {name: load_recipe(name).source for name in calib.shipped_recipes()}
    assert [row.split()[0] for row in rows] == list(sources)
    assert len({row.rindex(source) for row, source in zip(rows, sources.values(), strict=True)}) == 1


def test_a_printed_recipe_is_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: kvquant\noverrides:\n- {layers: [0, -1], key: {bits: 8}}\nexclude: ['layers.1']\n")
    assert calibrate.main(["--recipe", str(path), "--abits", "3", "--print-recipe"]) == 0
    path.write_text(capsys.readouterr().out)
    printed = load_recipe(path)
    assert printed.name == "mine"
    assert [printed.estimator("key", overrides).bits for overrides in ((), printed.overrides)] == [3, 8]  # type: ignore[attr-defined]


def test_a_wrong_recipe_is_one_line_of_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: kvquant\nkey:\n  bitz: 3\n")
    assert calibrate.main(["--recipe", str(path)]) == 1
    [message] = capsys.readouterr().err.splitlines()
    assert message.startswith(f"calibrate: recipe {path}, line 3: key.bitz: unknown entry")


def test_outputs_are_named_after_the_bits_that_a_wrapper_holds() -> None:
    wrapper = SimpleNamespace(inner=SimpleNamespace(inner=SimpleNamespace(bits=3)))
    found = default_output("statistics", SimpleNamespace(name="r", key=wrapper, value=IdentityEstimator()))  # type: ignore[arg-type]
    assert found == Path("runs/statistics-r/quantizers-k3v16.safetensors")
