"""Recipe files: errors name file and line; files extend each other; plans of msModelSlim are read as they stand."""

import logging
import re
from pathlib import Path

import pytest

from calib.recipe.recipe import Recipe, RecipeError, load_recipe, shipped_recipes

BODY = "key: {method: uniform}\nvalue: {method: uniform}\n"


def written(folder: Path, **files: str | bytes) -> str:
    """The path of the last of the files `NAME.yaml`."""
    for name, content in files.items():
        path = folder / f"{name}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def loaded(folder: Path, **files: str | bytes) -> Recipe:
    """The recipe in the last of the files."""
    return load_recipe(written(folder, **files))


def refused(folder: Path, **files: str | bytes) -> str:
    """What is said of the last of the files, without the folder's name."""
    path = written(folder, **files)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value).replace(f"{folder}/", "")


# Lines

LINES: dict[str, tuple[str, str]] = {
    "an entry": ("key:\n  method: uniform\n  bitz: 3\nvalue: {method: uniform}\n", "line 3: key.bitz: unknown entry"),
    "a value": ("sink_tokens:\n  9\n" + BODY, "line 1: sink_tokens: must be less"),
    "an item": (BODY + "exclude:\n- a\n- 3\n", "line 5: exclude.1: must be a valid string"),
    "deep inside": (
        "key:\n  method: uniform\n  outliers:\n\n    # half of it\n    fraction: 0.5\nvalue: {method: uniform}\n",
        "line 6: key.outliers.fraction: must be less than 0.5",
    ),
    "what holds a missing one": ("\n\nkey: {method: uniform}\n", "line 3: value: missing"),
    "an entry that contradicts itself": (
        "value: {method: uniform}\nkey:\n  method: uniform\n  symmetric: true\n  bits: 1\n",
        "line 2: key: one bit leaves",
    ),
    "an override": (
        BODY + "overrides:\n- layers: [0]\n  key:\n    bits: 8\n- layers: [1]\n  value:\n    bits: 12\n",
        "line 9: overrides.1.value.bits: must be less than or equal to 8; got 12; use 8",
    ),
    "an anchor": (
        "key: &grid\n  method: uniform\n  bits: 9\nvalue: {method: identity}\n",
        "line 3: key.bits: must be less",
    ),
    "a name that stands twice": (
        "key: {method: uniform}\n" + BODY,
        "line 2: key occurs twice; first in r.yaml, l",
    ),
    "a tab": (
        "key:\n\tmethod: uniform\n",
        "line 2: not YAML: found character '\\t' that cannot start any token; a t",
    ),
    "a bracket": ("key: {method: uniform\nvalue: [\n", "line 2: not YAML: "),
    "a second document": (f"{BODY}---\n{BODY}", "line 3: not YAML: but found another document"),
    "a list as name": ("? [a, b]\n: 3\n", "line 1: expected the name of an entry; got a list"),
    "code": (
        "name: a\nkey: !!python/object/apply:os.system ['true']\n",
        "line 2: expected plain entries; got !!pyth",
    ),
    "bytes": ("name: !!binary aGk=\n", "line 1: expected plain entries; got !!binary"),
    "an integer of letters": ("name: a\nsink_tokens: !!int four\n", "line 2: expected a value of type int; got"),
    "a list": ("- key\n- value\n", "line 1: expected entries such as key: {method: uniform}; got a list; start from"),
    "words": ("just some words", "line 1: expected entries such as key: {method: uniform}; got 'just some words'"),
    "nothing": ("# nothing\n", "line 1: expected entries such as key: {method: uniform}; got an empty file"),
}


@pytest.mark.parametrize(("text", "expected"), LINES.values(), ids=LINES)
def test_errors_name_the_line(tmp_path: Path, text: str, expected: str) -> None:
    assert refused(tmp_path, r=text).startswith(f"recipe r.yaml, {expected}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "recipe r.yaml, line 1: expected entries such as key: {method: uniform}; got an empty file; start from"),
        (b"\xff\xfe\x00text", "recipe r.yaml: expected UTF-8 text; got a binary file"),
        (b"key\x00value", "recipe r.yaml: expected text; got a binary file"),
        (b"#" * (2**20 + 1), "recipe r.yaml: expected a file of at most 1048576 bytes; got a larger one"),
        (b"[" * 5000, "recipe r.yaml: expected a few levels of nesting"),
        (b"a: &a [*a]", "recipe r.yaml: expected a few levels of nesting"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    assert refused(tmp_path, r=content).startswith(expected)


def test_anchors_that_multiply_each_other_are_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert refused(tmp_path, r="\n".join(rows)) == "recipe r.yaml: expected at most 10000 entries; got more"


def test_anchors_merge_keys_and_dates_are_read(tmp_path: Path) -> None:
    text = "name: 2026-01-01\nkey: &grid {method: uniform, bits: 3}\nvalue:\n  <<: *grid\n  bits: 5\n"
    recipe = loaded(tmp_path, r="\ufeff" + text)
    found = recipe.model_dump()
    assert (recipe.name, found["key"]["bits"], found["value"]["bits"]) == ("2026-01-01", 3, 5)


def test_a_folder_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    written(tmp_path, one=BODY, two=BODY)
    with pytest.raises(RecipeError, match=r"expected a file; got a folder; it contains one\.yaml, two\.yaml$"):
        load_recipe(tmp_path)


def test_an_artifact_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "q.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"q\.safetensors: expected a \.yaml file; .* --quantizer-path .*q\.safetens"):
        load_recipe(tmp_path / "q.safetensors")


@pytest.mark.parametrize(
    ("name", "reason", "advice"),
    [
        ("kvqant", "no such recipe", r"Did you mean kvquant\?"),
        ("xyzzy", "no such recipe", "kvquant-rank"),
        ("kvqant.yaml", "no such file", r"Did you mean kvquant\?"),
    ],
)
def test_an_unknown_recipe_lists_those_there_are(name: str, reason: str, advice: str) -> None:
    expected = rf"recipe '{name}': {reason}; expected a \.yaml file or one of .*default, .*{advice}"
    with pytest.raises(RecipeError, match=expected):
        load_recipe(name)


# One recipe from another


def test_a_file_is_named_after_itself_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert loaded(tmp_path, mine=BODY).name == "mine"
    assert loaded(tmp_path, mine=f"name: yours\n{BODY}").name == "yours"


@pytest.mark.parametrize("name", shipped_recipes())
def test_an_extension_inherits_all_but_the_name_and_the_source(tmp_path: Path, name: str) -> None:
    base, heir = load_recipe(name), loaded(tmp_path, heir=f"extends: {name}\n")
    assert (heir.name, heir.source) == ("heir", "")
    assert heir.model_copy(update={"name": base.name, "source": base.source}) == base


def test_an_extension_changes_entries_as_an_edit_does(tmp_path: Path) -> None:
    text = "extends: kvquant-rank\nsink_tokens: 2\nkey: {outliers: {fraction: 0.02}}\nvalue: {method: identity}\n"
    changes = {"sink_tokens": 2, "key": {"outliers": {"fraction": 0.02}}, "value": {"method": "identity"}}
    edited = load_recipe("kvquant-rank").edited({"name": "r", "source": "", **changes})
    assert loaded(tmp_path, r=text) == edited


def test_extensions_are_looked_for_beside_the_file_and_may_be_extended(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    written(tmp_path, outer="extends: kvquant\nsink_tokens: 3\nkey: {bits: 3}\n")
    written(tmp_path / "inside", middle="extends: ../outer.yaml\nkey: {bits: 2}\n")
    recipe = loaded(folder, inner="extends: middle.yaml\nvalue: {bits: 5}\n")
    found = recipe.model_dump()
    assert (recipe.sink_tokens, found["key"]["bits"], found["value"]["bits"]) == (3, 2, 5)


def test_an_error_is_looked_for_in_the_file_that_has_it(tmp_path: Path) -> None:
    right, wrong = "extends: kvquant\nname: base\n", "extends: kvquant\n\nkey:\n  bitz: 2\n"
    assert refused(tmp_path, base=wrong, r="extends: base.yaml\n").startswith("recipe base.yaml, line 4: key.bitz: unk")
    assert refused(tmp_path, base=right, r="name: r\nextends: base.yaml\nkey:\n  bitz: 2\n").startswith(
        "recipe r.yaml, line 4: key.bitz: unknown entry"
    )
    late = "extends: base.yaml\nkey:\n  bits: 1\n"
    assert refused(tmp_path, base=f"{right}key: {{symmetric: true}}\n", r=late).startswith(
        "recipe r.yaml, line 2: key: one bit leaves"
    )


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("kvqant", "extends: recipe 'kvqant': no such recipe; expected a .yaml file or one of"),
        ("other.yaml", "extends: recipe 'other.yaml': no such file"),
        ("[a, b]", "extends: expected the name of a recipe or a file; got ['a', 'b']"),
        ("broken.yaml", "extends: recipe broken.yaml, line 2: not YAML"),
        ("r.yaml", "extends: circular: r.yaml extends r.yaml; extend another recipe"),
    ],
)
def test_what_cannot_be_extended_is_refused_where_it_is_asked_for(tmp_path: Path, extends: str, expected: str) -> None:
    message = refused(tmp_path, broken="key: 1\n[", r=f"name: r\nextends: {extends}\n")
    assert message.startswith(f"recipe r.yaml, line 2: {expected}")


def test_a_circle_of_extensions_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, a="extends: b.yaml\n", b="extends: c.yaml\n", c="extends: a.yaml\n")
    assert message == (
        "recipe b.yaml, line 1: extends: circular: c.yaml extends a.yaml extends b.yaml extends c.yaml; extend another "
        "recipe"
    )


def test_extends_is_a_known_entry(tmp_path: Path) -> None:
    assert "Did you mean extends?" in refused(tmp_path, r=f"extend: kvquant\n{BODY}")


# msModelSlim


def as_kvgauge(name: str, *, symmetric: bool = True, **more: object) -> Recipe:
    """What a plan of msModelSlim means."""
    entry = {"method": "uniform", "bits": 8, "per": "channel", "symmetric": symmetric}
    source = "msModelSlim, dynamic_cache: static 8-bit ranges per channel, keys after RoPE"
    return Recipe.parse(
        {"name": name, "source": source, "stage": "post_rope", "key": entry, "value": entry, **more}, name
    )


def test_the_plans_in_the_description_of_msmodelslim_are_read_as_they_stand(shared: Path, tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((shared / "seeds").glob("*.txt"))]
    blocks = [block for text in texts for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    plans = [block for block in blocks if "dynamic_cache" in block]
    assert len(plans) == 2
    for plan in plans:
        assert loaded(tmp_path, plan=plan) == as_kvgauge("plan", exclude=["model.layers.0.self_attn"])


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("type: dynamic_cache\n", as_kvgauge("plan")),
        ("- type: dynamic_cache\n  include: []\n", as_kvgauge("plan")),
        ("type: dynamic_cache\nqconfig: {symmetric: false}\n", as_kvgauge("plan", symmetric=False)),
        ("type: dynamic_cache\ninclude: ['*.[0-3].*']\n", as_kvgauge("plan", include=["*.[0-3].*"])),
        (
            "apiversion: modelslim_v1\nmetadata: {score: 90}\ndataset: mix.jsonl\n"
            "spec:\n  process:\n  - {type: dynamic_cache, exclude: ['*.7.*']}\n  save:\n  - {type: ascendv1_saver}\n",
            as_kvgauge("plan", exclude=["*.7.*"]),
        ),
        (
            "- {type: dynamic_cache, include: ['*.0.*']}\n"
            "- {type: dynamic_cache, include: ['*.1.*'], qconfig: {symmetric: false}}\n",
            as_kvgauge(
                "plan",
                include=["*.0.*", "*.1.*"],
                overrides=[{"sites": ["*.1.*"], "key": {"symmetric": False}, "value": {"symmetric": False}}],
            ),
        ),
    ],
)
def test_plans_of_msmodelslim_become_recipes(tmp_path: Path, plan: str, expected: Recipe) -> None:
    assert loaded(tmp_path, plan=plan) == expected


def test_a_plan_can_be_extended(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, plan="type: dynamic_cache\n", r="extends: plan.yaml\nkey: {bits: 4}\n")
    assert (recipe.stage, recipe.model_dump()["key"]["bits"], recipe.name) == ("post_rope", 4, "r")


def test_processors_about_something_else_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = "spec:\n  process:\n  - type: linear_quant\n  - type: dynamic_cache\n"
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path, plan=plan) == as_kvgauge("plan")
    assert (
        caplog.text.replace(f"{tmp_path}/", "")
        .strip()
        .endswith("recipe plan.yaml: ignored, not for the cache: 'linear_quant' (plan.yaml, line 3)")
    )


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("spec:\n  process:\n  - type: linear_quant\n", "line 1: expected a processor of type dynamic_cache; got"),
        ("spec:\n  process:\n  - type: linear_quant\n", "got 'linear_quant' (r.yaml, line 3)"),
        ("apiversion: modelslim_v1\n", "line 1: spec.process: expected the list of processors"),
        (
            "spec:\n  process: 3\n",
            "line 2: spec.process: expected the list of processors of a plan of msModelSlim, such",
        ),
        (
            "- type: dynamic_cache\n  qconfig:\n    dtype: int4\n",
            "line 3: qconfig.dtype: must be 'int8'; got 'int4'. Did you mean int8?",
        ),
        ("type: dynamic_cache\nqconfig:\n  scope: per_token\n", "line 3: qconfig.scope: must be 'per_channel'; got"),
        ("type: dynamic_cache\nqconfig:\n  method: mse\n", "line 3: qconfig.method: must be 'minmax'; got 'mse'"),
        (
            "type: dynamic_cache\nqconfig:\n  symmetric: 1\n",
            "line 3: qconfig.symmetric: must be a valid boolean; got",
        ),
        ("type: dynamic_cache\nqconfig: {scop: a}\n", "line 2: qconfig.scop: unknown entry; known: scope, dtype, symm"),
        ("type: dynamic_cache\nexcluded: []\n", "line 2: excluded: unknown entry; known: type, qconfig, include, excl"),
        (
            "- {type: dynamic_cache, exclude: [a]}\n- {type: dynamic_cache}\n",
            "line 2: expected the same exclude in all processors; got",
        ),
    ],
)
def test_what_msmodelslim_has_not_got_is_refused(tmp_path: Path, plan: str, expected: str) -> None:
    message = refused(tmp_path, r=plan)
    assert message.startswith("recipe r.yaml, line ")
    assert expected in message
