"""README and docs: commands are taken by their programs, names and paths are there, lines fit."""

import importlib
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

import kvgauge as kg
from calib import shipped_recipes
from calib.estimators import AnyEstimator

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results"
PROGRAMS = ("calibrate", "evaluate", "artifact", "kvgauge")
PLACEHOLDERS = {"...", "…", "FLAGS"}
"""What stands in commands for words that do not matter there."""


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def losses() -> set[str]:
    """Losses with their errors in docs/results, as pages write them, without signs."""
    rows = [row["figures"] for file in RESULTS.glob("*.json") for row in json.loads(read(file))["rows"]]
    pairs = [(row.get("loss_nats", row.get("nats")), row.get("loss_nats_stderr", row.get("stderr"))) for row in rows]
    return {f"{abs(nats):.4f} ± {error:.4f}" for nats, error in pairs if None not in (nats, error)}


def commands(text: str) -> list[list[str]]:
    """What a page tells to type: lines of code blocks, and code within lines, that begin with a program's name."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    lines += [line for line in inline if len(line.split()) > 2]  # two words are a program's name
    typed = [shlex.split(line.partition(" >")[0], comments=True) for line in lines if line.startswith(PROGRAMS)]
    return [[word for word in words if word not in PLACEHOLDERS] for words in typed if words[0] in PROGRAMS]


def is_taken(words: list[str]) -> bool:
    """Whether the program's own parser accepts the options."""
    program, *rest = words[1:] if words[0] == "kvgauge" else words
    if program.startswith("-"):
        return program in ("--help", "--version")
    try:
        importlib.import_module(f"kvgauge.cli.{program}").parser().parse_args(rest)
    except SystemExit as stopped:
        return stopped.code == 0
    return True


def expanded(text: str) -> str:
    """Names with alternatives written out: `kivi-{2,4}` becomes `kivi-2` `kivi-4`."""

    def alternatives(name: re.Match[str]) -> str:
        parts = [part.split(",") for part in re.split(r"[{}]", name[1])]
        return " ".join(f"`{''.join(words)}`" for words in itertools.product(*parts))

    return re.sub(r"`([\w-]*\{[\w,-]+\}[\w-]*)`", alternatives, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_its_program_takes(page: Path) -> None:
    assert [shlex.join(words) for words in commands(read(page)) if not is_taken(words)] == []


def test_commands_are_found_and_wrong_ones_refused() -> None:
    assert len(commands(read(README))) > 15
    assert not is_taken(["calibrate", "--quantizer-pat", "q.pkl"])
    assert not is_taken(["kvgauge", "sweep"])


def test_the_readme_can_be_read_in_one_go() -> None:
    lines = read(README).splitlines()
    assert len(lines) <= 170
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_fit_but_for_tables_and_results(page: Path) -> None:
    own = re.sub(r"(?<!`)<!-- results:.*?<!-- /results -->", "", read(page), flags=re.DOTALL)
    assert [line for line in own.splitlines() if len(line) > 100 and not line.startswith("|")] == []


def test_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", read(README))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_recipe_and_method_is_explained() -> None:
    pages = expanded("".join(read(page) for page in PAGES if page.parent.name == "recipes"))
    assert [name for name in shipped_recipes() if f"`{name}`" not in pages] == []
    methods = [estimator.model_fields["method"].default for estimator in get_args(get_args(AnyEstimator)[0])]
    index = read(ROOT / "docs/recipes/index.md")
    assert [name for name in methods if f"`{name}`" not in index] == []


def test_losses_beside_recipes_are_those_of_the_results() -> None:
    text = " ".join("".join(read(page) for page in PAGES if page.parent.name == "recipes").split())
    stated = re.findall(r"\d\.\d{4} ± \d\.\d{4}", text)
    assert len(stated) > 20
    assert sorted(set(stated) - losses()) == []


def test_names_of_the_public_face_are_there() -> None:
    names = {name for page in PAGES for name in re.findall(r"\bkg\.(\w+)", read(page))}
    assert names
    assert sorted(names - set(kg.__all__)) == []


def test_paths_in_the_walks_are_there() -> None:
    text = read(ROOT / "docs/architecture.md") + read(ROOT / "CONTRIBUTING.md")
    paths = re.findall(r"`((?:artifacts|calib|simquant|kvgauge|scripts|tests|docs|notebooks)/[\w/.]+)`", text)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
