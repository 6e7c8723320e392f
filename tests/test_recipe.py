"""Recipes: files, edits, errors that say what to write instead; and the flags that stand for edits."""

from pathlib import Path
from typing import Any

import pytest

from artifacts.sites import Site
from calib.estimators import CodebookEstimator, IdentityEstimator, UniformEstimator
from calib.recipe import Recipe, RecipeError, load_recipe, shipped_recipes
from scripts.calibrate import parser
from scripts.console import UsageError, dashes
from scripts.options import recipe_changes

PLAIN: dict[str, Any] = {
    "name": "plain",
    "key": {"method": "uniform", "bits": 4},
    "value": {"method": "codebook", "bits": 3, "per": "token", "outliers": {"fraction": 0.02, "rule": "rank"}},
}

# Files


def test_the_shipped_recipes() -> None:
    assert shipped_recipes() == ["default", "kvquant", "kvquant-rank"]
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.source
        assert recipe.stage == "pre_rope"


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe, path = load_recipe(name), tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(path)).to_yaml() == recipe.to_yaml()


def test_keys_and_values_have_their_own_estimators() -> None:
    recipe = Recipe.parse(PLAIN, "plain")
    assert recipe.estimator(Site(3, "key", "pre_rope")) == UniformEstimator(bits=4)
    value = recipe.estimator(Site(0, "value"))
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


# Errors

WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"stagee": "pre_rope"}, ["stagee: unknown entry", "Did you mean stage?"]),
    "unknown hyper-parameter": (
        {"key": {"method": "uniform", "bitz": 3}},
        ["key.uniform.bitz: unknown entry", "symmetric", "Did you mean bits?"],
    ),
    "of another method": (
        {"key": {"method": "codebook", "symmetric": True}},
        ["key.codebook.symmetric: unknown entry", "tables"],
    ),
    "of outliers": (
        {"value": {"method": "uniform", "outliers": {"fractoin": 0.1}}},
        ["value.uniform.outliers.fractoin: unknown entry; known: fraction, rule.", "Did you mean fraction?"],
    ),
    "outliers of nothing": (
        {"key": {"method": "identity", "outliers": {}}},
        ["key.identity.outliers: unknown entry; known: method."],
    ),
    "unknown method": ({"key": {"method": "magic"}}, ["key: ", "'magic'", "identity, uniform, codebook"]),
    "misspelt method": ({"key": {"method": "codebok"}}, ["key: ", "Did you mean codebook?"]),
    "too many bits": ({"key": {"method": "uniform", "bits": 9}}, ["key.uniform.bits: ", "equal to 8; got 9"]),
    "no bits": ({"key": {"method": "codebook", "bits": 0}}, ["key.codebook.bits: ", "equal to 1; got 0"]),
    "tokens with channel tables": (
        {"key": {"method": "codebook", "per": "token", "tables": "channel"}},
        ["key.codebook: ", "one table per site", "use tables: site"],
    ),
    "tokens with query weights": (
        {"value": {"method": "codebook", "per": "token", "weights": "query"}},
        ["value.codebook: ", "use weights: scale2 or none"],
    ),
    "one symmetric bit": (
        {"key": {"method": "uniform", "bits": 1, "symmetric": True}},
        ["key.uniform: ", "use at least 2 bits"],
    ),
    "symmetric with a zero point": (
        {"key": {"method": "uniform", "symmetric": True, "whole_zero_point": True}},
        ["drop symmetric or whole_zero_point"],
    ),
    "too many sinks": ({"sink_tokens": 9}, ["sink_tokens: ", "equal to 8; got 9"]),
    "unknown stage": ({"stage": "post"}, ["stage: ", "'post_rope'", "got 'post'"]),
    "all outliers": ({"key": {"method": "uniform", "outliers": {"fraction": 0.5}}}, ["outliers.fraction: ", "got 0.5"]),
}


@pytest.mark.parametrize(("change", "expected"), WRONG.values(), ids=WRONG)
def test_errors_name_the_place_and_what_to_write(change: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({**PLAIN, **change}, "plain")
    message = str(caught.value)
    assert message.startswith("recipe plain:\n  ")
    for part in expected:
        assert part in message


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"nam": "x", "key": {"method": "uniform", "bits": 9}}, "two")
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "name",
        "key.uniform.bits",
        "value",
        "nam",
    ]


@pytest.mark.parametrize(("name", "advice"), [("kvqant", r"Did you mean kvquant\?"), ("xyzzy", "kvquant-rank")])
def test_an_unknown_recipe_lists_those_there_are(name: str, advice: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"recipe '{name}': no such recipe; expected a \.yaml file or one of default, .*{advice}"
    ):
        load_recipe(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"key: [unclosed", "not YAML"),
        (b"\xff\xfe\x00text", "not YAML"),
        (b"just some words", "expected entries; got 'just some words'"),
        (b"", "an empty file; start from"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"recipe .*r\.yaml:(?s:.*){message}"):
        load_recipe(str(path))


# Flags


def asked(recipe: str, flags: str | list[str]) -> dict[str, Any]:
    """The recipe that the flags make of a shipped one."""
    base = load_recipe(recipe)
    words = [dashes(word) for word in (flags.split() if isinstance(flags, str) else flags)]
    args = parser().parse_args(words)
    return base.edited(recipe_changes(args, base.model_dump(mode="json"))).model_dump(mode="json")


def picked(entry: dict[str, Any], path: str) -> Any:
    """`key.outliers.fraction` of a recipe."""
    for name in path.split("."):
        entry = entry[name]
    return entry


SPARSE = {"rule": "percentile", "fraction": 0.01}
IDENTITY = {"method": "identity"}
FLAGS: list[tuple[str, str | list[str], dict[str, Any]]] = [
    ("default", "--abits 3", {"key.bits": 3, "value.bits": 3, "key.method": "codebook"}),
    ("default", "--bits 2", {"key.bits": 2, "value.bits": 2}),
    ("default", "--abits 16", {"key": IDENTITY, "value": IDENTITY}),
    ("kvquant", "--abits 4 --key-bits 2", {"key.bits": 2, "value.bits": 4}),
    ("kvquant", "--kbits 3 --vbits 5", {"key.bits": 3, "value.bits": 5}),
    ("kvquant", "--key-bits 16 --abits 3", {"key": IDENTITY, "value.bits": 3}),
    ("default", "--nuq", {"key.method": "codebook", "key.tables": "channel", "value.method": "codebook"}),
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
    assert recipe_changes(parser().parse_args([]), load_recipe(recipe).model_dump(mode="json")) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--perchannel k_proj --pertoken k_proj v_proj", "both name key; name each once"),
        ("--perchannel q_proj", r"expected k_proj and/or v_proj, got 'q_proj' \(MODEL stands before"),
        ("--include-sparse --sparsity-threshold 0.01", "share kept dense, above 0.5 and at most 1; got 0.01"),
        ("--include-sparse --sparsity-threshold 1.5", "at most 1; got 1.5"),
        ("--sparsity-threshold 0.99", "add --include-sparse"),
        ("--perchannel", "need k_proj and/or v_proj"),
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


@pytest.mark.parametrize("flags", ["--abits 9", "--abits three", "--stage mid_rope", "--nsamples 0", "--shard 3/2"])
def test_values_that_no_option_takes_are_refused_by_the_parser(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        asked("default", flags)
    assert caught.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
