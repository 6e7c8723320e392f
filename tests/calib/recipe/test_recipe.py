"""Recipes: files, edits, errors that say what to write instead; and the flags that stand for edits."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calib.estimators import CodebookEstimator, IdentityEstimator, UniformEstimator
from calib.recipe.errors import recipe_error
from calib.recipe.override import merged
from calib.recipe.recipe import Recipe, RecipeError, load_recipe, shipped_recipes
from kvgauge.cli.calibrate import parser
from kvgauge.cli.options.common import parsed
from kvgauge.configuration.recipe import RecipeConfig, recipe_changes
from kvgauge.terminal.console import UsageError, dashes

PLAIN: dict[str, Any] = {
    "name": "plain",
    "key": {"method": "uniform", "bits": 4},
    "value": {"method": "codebook", "bits": 3, "per": "token", "outliers": {"fraction": 0.02, "rule": "rank"}},
}

# Files


def test_the_shipped_recipes() -> None:
    assert {"default", "kvquant", "kvquant-rank"} <= set(shipped_recipes())
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.source


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe, path = load_recipe(name), tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert load_recipe(str(path)).to_yaml() == recipe.to_yaml()


def test_keys_and_values_have_their_own_estimators() -> None:
    recipe = Recipe.parse(PLAIN, "plain")
    assert recipe.estimator("key") == UniformEstimator(bits=4)
    value = recipe.estimator("value")
    assert isinstance(value, CodebookEstimator)
    assert value.outliers is not None
    assert (value.bits, value.per, value.outliers.rule) == (3, "token", "rank")
    with pytest.raises(ValueError, match="frozen"):
        recipe.sink_tokens = 3  # type: ignore[misc]


# Edits


def test_edits_go_deep_and_leave_the_original_alone() -> None:
    recipe = Recipe.parse(PLAIN, "plain")
    edited = recipe.edited({"key": {"bits": 2}, "value": {"outliers": {"fraction": 0.01}}, "sink_tokens": 4})
    assert edited.key == UniformEstimator(bits=2)
    assert edited.value == recipe.value.model_copy(update={"outliers": edited.value.outliers})  # type: ignore[union-attr]
    assert edited.model_dump()["value"]["outliers"] == {"fraction": 0.01, "rule": "rank"}
    assert edited.sink_tokens == 4
    assert recipe == Recipe.parse(PLAIN, "plain")
    assert recipe.edited({}) == recipe


def test_an_edit_with_a_method_replaces_the_entry() -> None:
    edited = Recipe.parse(PLAIN, "plain").edited({"key": {"method": "codebook"}, "value": {"method": "identity"}})
    assert edited.key == CodebookEstimator()
    assert edited.value == IdentityEstimator()


def test_an_edit_can_take_outliers_away() -> None:
    edited = Recipe.parse(PLAIN, "plain").edited({"value": {"outliers": None}})
    assert edited.model_dump()["value"]["outliers"] is None


def test_exact_keys_are_so_in_every_layer() -> None:
    ends = {"layers": [0, -1], "key": {"bits": 8}, "value": {"bits": 8}}
    keys_only = {"layers": [1], "key": {"method": "codebook"}}
    recipe = Recipe.parse({**PLAIN, "overrides": [ends, keys_only]}, "plain")
    exact = recipe.edited({"key": {"method": "identity"}})
    assert [(one.key, one.value) for one in exact.overrides] == [(None, {"bits": 8})]
    assert recipe.edited({"key": {"bits": 2}}).overrides == recipe.overrides


def test_overrides_survive_a_dump() -> None:
    rows = [{"layers": [0], "key": {"bits": 16}}, {"sites": "*.value", "value": {"outliers": None}}]
    recipe = Recipe.parse({**PLAIN, "overrides": rows, "include": "*", "exclude": ["layers.{1,2}"]}, "plain")
    assert Recipe.parse(recipe.model_dump(mode="json"), "again") == recipe
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml()), "again") == recipe
    assert (recipe.include, recipe.overrides[1].sites) == (("*",), ("*.value",))


@pytest.mark.parametrize("name", shipped_recipes())
def test_an_override_of_nothing_changes_nothing(name: str) -> None:
    recipe = load_recipe(name)
    nothing = recipe.edited({"overrides": [{"sites": "*", "key": {}, "value": {}}]})
    assert [nothing.estimator(t, nothing.overrides) for t in ("key", "value")] == [recipe.key, recipe.value]


def test_what_a_wrapper_does_not_know_is_meant_for_what_it_holds() -> None:
    grid = {"method": "uniform", "bits": 4, "outliers": None}
    entry = {"method": "a", "seed": 1, "inner": {"method": "b", "mean": 0, "inner": grid}}
    found = merged({"key": entry}, {"key": {"bits": 3, "seed": 2, "mean": 5, "colour": 7}})["key"]
    inner = {"method": "b", "mean": 5, "inner": {**grid, "bits": 3}}
    assert found == {"method": "a", "seed": 2, "inner": inner, "colour": 7}
    assert merged(entry, {"inner": {"inner": {"method": "identity"}}})["inner"]["inner"] == {"method": "identity"}
    assert entry["inner"]["inner"] is grid
    assert grid["bits"] == 4


# Errors

WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"stagee": "pre_rope"}, ["stagee: unknown entry", "Did you mean stage?"]),
    "unknown hyper-parameter": (
        {"key": {"method": "uniform", "bitz": 3}},
        ["key.bitz: unknown entry", "symmetric", "Did you mean bits?"],
    ),
    "of another method": (
        {"key": {"method": "codebook", "symmetric": True}},
        ["key.symmetric: unknown entry", "tables"],
    ),
    "of outliers": (
        {"value": {"method": "uniform", "outliers": {"fractoin": 0.1}}},
        ["value.outliers.fractoin: unknown entry; known: fraction, rule.", "Did you mean fraction?"],
    ),
    "outliers of nothing": (
        {"key": {"method": "identity", "outliers": {}}},
        ["key.outliers: unknown entry; known: method."],
    ),
    "unknown method": ({"key": {"method": "magic"}}, ["key: unknown method 'magic'", "known: identity, uniform, "]),
    "misspelt method": ({"key": {"method": "codebok"}}, ["key: ", "Did you mean codebook?"]),
    "no method": ({"key": {"bits": 3}}, ["key: method is missing; known: identity, uniform, "]),
    "too many bits": ({"key": {"method": "uniform", "bits": 9}}, ["key.bits: ", "equal to 8; got 9; use 8"]),
    "exact bits": ({"key": {"method": "uniform", "bits": 16}}, ["key.bits: ", "got 16; use 8, or method: identity"]),
    "no bits": ({"key": {"method": "codebook", "bits": 0}}, ["key.bits: ", "equal to 1; got 0; use 1"]),
    "unknown solver": (
        {"key": {"method": "codebook", "kmeans": "sclearn"}},
        ["key.kmeans: must be 'exact' or 'sklearn'; got 'sclearn'", "Did you mean sklearn?"],
    ),
    "true bits": ({"key": {"method": "uniform", "bits": True}}, ["key.bits: must be a valid integer; got True"]),
    "bits in quotes": ({"key": {"method": "uniform", "bits": "3"}}, ["key.bits: ", "got '3'; write 3"]),
    "a number without a point": (
        {"key": {"method": "codebook", "pooling": "1e-1"}},
        ["key.pooling: must be a valid number; got '1e-1'; write 0.1"],
    ),
    "an entry that is a number": ({"key": 4}, ["key: must be entries, such as {method: uniform}; got 4"]),
    "tokens with channel tables": (
        {"key": {"method": "codebook", "per": "token", "tables": "channel"}},
        ["key: ", "one table per site", "use tables: site"],
    ),
    "tokens with query weights": (
        {"value": {"method": "codebook", "per": "token", "weights": "query"}},
        ["value: ", "use weights: scale2 or none"],
    ),
    "one symmetric bit": (
        {"key": {"method": "uniform", "bits": 1, "symmetric": True}},
        ["key: ", "use at least 2 bits"],
    ),
    "symmetric with a zero point": (
        {"key": {"method": "uniform", "symmetric": True, "whole_zero_point": True}},
        ["key: ", "drop symmetric or whole_zero_point"],
    ),
    "too many sinks": ({"sink_tokens": 16}, ["sink_tokens: must be less than or equal to 8; got 16; use 8"]),
    "sinks in other words": ({"sink_tokens": "some"}, ["sink_tokens: ", "must be 'auto'; got 'some'"]),
    "unknown stage": ({"stage": "post"}, ["stage: ", "'post_rope'; got 'post'. Did you mean post_rope?"]),
    "all outliers": (
        {"key": {"method": "uniform", "outliers": {"fraction": 0.5}}},
        ["key.outliers.fraction: ", "got 0.5"],
    ),
    "a name that is a path": ({"name": "../mine"}, ["name: expected a file name", "got '../mine'"]),
    "nothing included": ({"include": []}, ["include: must not be empty"]),
    "a number as pattern": ({"exclude": ["*", 3]}, ["exclude.1: must be a valid string; got 3"]),
    "a pattern of thousands": ({"exclude": "{1..9999}"}, ["exclude.0: expected a glob such as", "limit"]),
    "inside a wrapper": (
        {"key": {"method": "hadamard", "inner": {"method": "centred", "inner": {"method": "uniform", "bitz": 3}}}},
        ["key.inner.inner.bitz: unknown entry; known: method, bits", "Did you mean bits?"],
    ),
    "an unknown method inside a wrapper": (
        {"key": {"method": "hadamard", "inner": {"method": "unifrom"}}},
        ["key.inner: unknown method 'unifrom'; known: identity, ", "Did you mean uniform?"],
    ),
    "an override nowhere": ({"overrides": [{"key": {"bits": 3}}]}, ["overrides.0: give exactly one of layers and"]),
    "an override twice": ({"overrides": [{"layers": [0], "sites": "*", "key": {}}]}, ["overrides.0: give exactly one"]),
    "an override of neither": ({"overrides": [{"layers": [0]}]}, ["overrides.0: give changes for key"]),
    "an override of no layer": ({"overrides": [{"layers": [], "key": {}}]}, ["overrides.0.layers: must not be empty"]),
    "a layer that is none": (
        {"overrides": [{"layers": [0, True], "key": {}}]},
        ["overrides.0.layers.1: must be a valid integer; got True"],
    ),
    "an override of bits": (
        {"overrides": [{"layers": [0], "bits": 3}]},
        ["overrides.0.bits: unknown entry; known: "],
    ),
    "an override to wrong bits": (
        {"overrides": [{"layers": [0], "key": {}}, {"layers": [1], "key": {"bits": 12}}]},
        ["overrides.1.key.bits: must be", "equal to 8; got 12; use 8"],
    ),
    "an override of what is not there": (
        {"overrides": [{"layers": [0], "value": {"symetric": True}}]},
        ["overrides.0.value.symetric: unknown entry; known: method, bits, "],
    ),
    "an override to the impossible": (
        {"overrides": [{"layers": [0], "key": {"symmetric": True, "bits": 1}}]},
        ["overrides.0.key: one bit leaves"],
    ),
    "an override to another method": (
        {"overrides": [{"layers": [0], "key": {"method": "codebok"}}]},
        ["overrides.0.key: unknown method 'codebok'", "Did you mean codebook?"],
    ),
}


@pytest.mark.parametrize(("change", "expected"), WRONG.values(), ids=WRONG)
def test_errors_name_the_place_and_what_to_write(change: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({**PLAIN, **change}, "plain")
    [message] = str(caught.value).splitlines()
    assert message.startswith(f"recipe plain: {expected[0]}")
    assert ("identity, which keeps" in message) == (change == {"key": {"method": "uniform", "bits": 16}})
    for part in expected:
        assert part in message


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"nam": "x", "key": {"method": "uniform", "bits": 9}}, "two")
    rows = [line.removeprefix("recipe two: ").split(":")[0] for line in str(caught.value).splitlines()]
    assert rows == ["name", "key.bits", "value", "nam"]


def test_overrides_that_do_not_go_together_are_refused() -> None:
    rows = [{"layers": [0], "key": {"bits": 16}}, {"sites": "layers.0", "key": {"bits": 4}}]
    recipe = Recipe.parse({**PLAIN, "overrides": rows}, "plain")
    with pytest.raises(RecipeError, match="plain: overrides of key together: bits: unknown entry; known: method"):
        recipe.estimator("key", recipe.overrides)


def test_a_value_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe plain: expected numbers, texts, lists and entries; .*complex"):
        Recipe.parse({**PLAIN, "sink_tokens": 1j}, "plain")


class Wrapper(BaseModel):
    """Holds another entry, as deep as one likes."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["wrapper"] = "wrapper"
    seed: int | Literal["none"] = 0
    inner: "Annotated[Wrapper | Grid, Field(discriminator='method')]"


class Grid(BaseModel):
    """Holds nothing."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["grid"] = "grid"
    bits: int = Field(default=4, le=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bitz": 3}, "inner.inner.bitz: unknown entry; known: method, bits. Did you mean bits?"),
        ({"bits": 9}, "inner.inner.bits: must be less than or equal to 8; got 9; use 8"),
        ({"method": "gird"}, "inner.inner: unknown method 'gird'; known: wrapper, grid. Did you mean grid?"),
        ({"method": "wrapper"}, "inner.inner.inner: missing; add it"),
    ],
)
def test_errors_inside_wrappers_name_what_is_known_there(change: dict[str, Any], message: str) -> None:
    entry = {"inner": {"method": "wrapper", "inner": {"method": "grid", **change}}}
    with pytest.raises(ValidationError) as caught:
        Wrapper.model_validate(entry)
    marks = {(): "r.yaml, line 1", ("inner", "inner"): "r.yaml, line 7"}
    assert str(recipe_error(caught.value, Wrapper, "r", marks)) == f"recipe r.yaml, line 7: {message}"


def test_the_types_that_a_value_might_have_share_a_line() -> None:
    with pytest.raises(ValidationError) as caught:
        Wrapper.model_validate({"seed": [], "inner": {"method": "grid"}})
    message = str(recipe_error(caught.value, Wrapper, "r", {}))
    assert message == "recipe r: seed: must be a valid integer; got [] or must be 'none'; got []"


# Flags


def asked(recipe: str, flags: str | list[str]) -> dict[str, Any]:
    """The recipe that the flags make of a shipped one."""
    base = load_recipe(recipe)
    words = [dashes(word) for word in (flags.split() if isinstance(flags, str) else flags)]
    config = parsed(RecipeConfig, parser().parse_args(words))
    return base.edited(recipe_changes(config, base.model_dump(mode="json"))).model_dump(mode="json")


def picked(entry: dict[str, Any], path: str) -> Any:
    """`key.outliers.fraction` of a recipe."""
    for name in path.split("."):
        entry = entry[name]
    return entry


SPARSE = {"rule": "percentile", "fraction": 0.01}
IDENTITY = {"method": "identity"}
FLAGS: list[tuple[str, str | list[str], dict[str, Any]]] = [
    ("default", "--abits 3", {"key.method": "rotated", "key.inner.bits": 3.0, "value.bits": 3}),
    ("default", "--bits 2", {"key.inner.bits": 2.0, "value.bits": 2}),
    ("predictive", "--key-bits 3", {"key.inner.inner.bits": 3.0, "value.inner.inner.bits": 2.0}),
    ("default", "--abits 16", {"key": IDENTITY, "value": IDENTITY}),
    ("kvquant", "--abits 4 --key-bits 2", {"key.bits": 2, "value.bits": 4}),
    ("kvquant", "--kbits 3 --vbits 5", {"key.bits": 3, "value.bits": 5}),
    ("kvquant", "--key-bits 16 --abits 3", {"key": IDENTITY, "value.bits": 3}),
    ("default", "--nuq", {"key.method": "rotated", "key.inner.method": "mixed_codebook", "value.method": "codebook"}),
    (
        "default",
        "--nuq --include-sparse --abits 3",
        {"key.method": "codebook", "key.bits": 3, "key.weights": "query", "key.outliers": SPARSE, "value.bits": 3},
    ),
    ("quarot-4", "--symmetric", {"key.method": "hadamard", "key.inner.symmetric": True}),
    ("quarot-4", "--nuq", {"key.method": "codebook", "key.bits": 4}),
    (
        "default",
        "--no-nuq",
        {"key.method": "uniform", "key.per": "channel", "value.method": "uniform", "value.per": "token"},
    ),
    ("kvquant", "--no-nuq", {"key.method": "uniform", "key.threshold_dtype": "float16", "value.per": "token"}),
    (
        "kvquant",
        "--nuq",
        {
            "key.method": "codebook",
            "key.weights": "query",
            "key.tables": "site",
            "key.threshold_dtype": "float16",
            "value.method": "codebook",
            "value.weights": "scale2",
            "value.per": "token",
        },
    ),
    ("kvquant", "--nuq --abits 2", {"key.bits": 2, "value.bits": 2, "value.method": "codebook"}),
    ("kvquant", "--include_sparse", {"key.outliers": SPARSE, "value.outliers": SPARSE}),
    ("kvquant", "--include_sparse --sparsity-threshold 0.98", {"key.outliers.fraction": 0.02}),
    (
        "kvquant",
        "--nuq --include-sparse --sparsity_threshold=0.995",
        {"key.outliers.fraction": 0.005, "key.method": "codebook", "value.outliers.fraction": 0.005},
    ),
    ("kvquant", "--sparsity-threshold 1.0", {"key.outliers": None, "value.outliers": None}),
    ("kvquant", "--include-sparse --sparsity-threshold 1", {"key.outliers": None, "value.outliers": None}),
    ("kvquant-rank", "--sparsity-threshold 0.98", {"key.outliers": {"rule": "rank", "fraction": 0.02}}),
    ("kvquant-rank", "--no-include-sparse", {"key.outliers": None, "value.outliers": None}),
    (
        "default",
        ["--perchannel", '["k_proj"]', "--pertoken", '["v_proj"]'],
        {"key.per": "channel", "value.per": "token"},
    ),
    ("default", ["--perchannel", '["k_proj", "v_proj"]'], {"key.per": "channel", "value.per": "channel"}),
    ("default", ["--perchannel", "['k_proj','v_proj']"], {"key.per": "channel", "value.per": "channel"}),
    ("default", "--pertoken k_proj v_proj", {"key.per": "token", "key.tables": "site", "value.per": "token"}),
    ("kvquant-rank", "--pertoken k_proj,v_proj", {"key.per": "token", "key.weights": "scale2"}),
    ("kvquant", "--nuq --pertoken k_proj", {"key.per": "token", "key.weights": "scale2", "value.per": "token"}),
    (
        "kvquant",
        "--perchannel v_proj --nuq",
        {"key.weights": "query", "value.per": "channel", "value.weights": "scale2"},
    ),
    ("default", ["--perchannel", "[]", "--pertoken", "[]"], {"key": IDENTITY, "value": IDENTITY}),
    ("kvquant", "--perchannel --pertoken", {"key": IDENTITY, "value": IDENTITY}),
    ("kvquant", "--perchannel k_proj --pertoken", {"key.per": "channel", "value": IDENTITY}),
    ("kvquant", "--first_few_fp16 -1", {"sink_tokens": 0}),
    ("kvquant", "--first-few-fp16 5", {"sink_tokens": 5}),
    ("kvquant", "--first-few-fp16 auto", {"sink_tokens": "auto"}),
    ("default", "--first-few-fp16 0", {"sink_tokens": 0}),
    ("kvquant", "--clamp", {"key.whole_zero_point": True, "value.whole_zero_point": True}),
    ("default", "--no-nuq --symmetric", {"key.method": "uniform", "key.symmetric": True, "value.symmetric": True}),
    ("default", "--no-nuq --clamp", {"key.whole_zero_point": True, "value.whole_zero_point": True}),
    ("default", "--stage post_rope", {"stage": "post_rope"}),
]


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"), FLAGS, ids=lambda value: str(value) if isinstance(value, str | list) else ""
)
def test_flags_edit_the_recipe(recipe: str, flags: str | list[str], expected: dict[str, Any]) -> None:
    found = asked(recipe, flags)
    assert {path: picked(found, path) for path in expected} == expected


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_without_flags_nothing_changes(recipe: str) -> None:
    assert asked(recipe, "") == load_recipe(recipe).model_dump(mode="json")
    assert recipe_changes(RecipeConfig(), load_recipe(recipe).model_dump(mode="json")) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--perchannel k_proj --pertoken k_proj v_proj", "both name key; name each once"),
        ("--perchannel q_proj", r"expected k_proj or v_proj; got 'q_proj'\. Put MODEL before"),
        (
            "--include-sparse --sparsity-threshold 0.01",
            "fraction of values quantized, above 0.5 and at most 1; got 0.01",
        ),
        ("--include-sparse --sparsity-threshold 1.5", "at most 1; got 1.5"),
        ("--sparsity-threshold 0.99", "add --include-sparse"),
        ("--perchannel", "need values: k_proj, v_proj or both"),
    ],
)
def test_contradictions_are_wrong_usage(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked("default", flags)


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("kvquant", "--abits 1 --symmetric", "use at least 2 bits"),
        ("kvquant", "--symmetric --clamp", "drop symmetric or whole_zero_point"),
        ("kvquant", "--nuq --symmetric", "symmetric: unknown entry"),
        ("kvquant", "--first-few-fp16 9", "sink_tokens"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(recipe: str, flags: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        asked(recipe, flags)


@pytest.mark.parametrize(
    "flags", ["--abits 9", "--abits three", "--stage mid_rope", "--nsamples 0", "--shard 3/2", "--first-few-fp16 few"]
)
def test_values_that_no_option_takes_are_refused_by_the_parser(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        asked("default", flags)
    assert caught.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
