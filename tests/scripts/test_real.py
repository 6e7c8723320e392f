"""Claims hold within their bounds and fail beyond them, parts of a text share nothing, and the check runs."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from calib.recipe.recipe import load_recipe
from kvgauge.terminal.console import UsageError
from scripts.real import claims, parts
from scripts.real.claim import Claim, table
from scripts.real.measurement import measure


@pytest.mark.parametrize(
    ("measured", "stderr", "bound", "holds"),
    [
        (0.9, 0.0, {"at_most": 1.0}, True),
        (1.1, 0.0, {"at_most": 1.0}, False),
        (1.1, 0.06, {"at_most": 1.0}, True),
        (1.1, 0.04, {"at_most": 1.0}, False),
        (1.1, 0.0, {"at_least": 1.0}, True),
        (0.9, 0.04, {"at_least": 1.0}, False),
        (math.nan, 0.0, {"at_most": 1.0}, False),
        (0.5, math.nan, {"at_most": 1.0}, False),
    ],
)
def test_a_claim_holds_up_to_two_errors_beyond_its_bound(
    measured: float, stderr: float, bound: dict[str, float], holds: bool
) -> None:
    claim = Claim(what="a figure", measured=measured, stderr=stderr, **bound)
    assert claim.holds == holds
    assert ("holds" in table([claim])) == holds
    assert ("FAILS" in table([claim])) != holds


def articles(n: int) -> str:
    return "\n".join(f" = Article {i} = \n\n{f'words of {i} . ' * 9}\n = = Section = = \n" for i in range(n))


def test_parts_are_the_whole_text_cut_at_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(articles(100))
    assert parts.main(["text.txt"]) == 0
    found = [Path(f"{name}.txt").read_text() for name in parts.PARTS]
    assert "".join(found) == articles(100)
    assert [len(part) / len(articles(100)) for part in found] == pytest.approx([0.5, 0.17, 0.33], abs=0.01)
    assert all(part.startswith(" = Article") for part in found)


@pytest.mark.parametrize("text", ["no titles at all\n", articles(1)])
def test_a_text_without_articles_is_not_cut(text: str) -> None:
    with pytest.raises(UsageError, match="expected articles in three parts"):
        parts.parts(text)


def test_wikitext_is_cut_where_our_figures_say(shared: Path) -> None:
    text = (shared / "data" / "wikitext2-test.txt").read_text(encoding="utf-8")
    assert [round(len(part) / len(text), 4) for part in parts.parts(text)] == [0.5013, 0.1688, 0.3299]


def test_all_claims_are_made_of_what_was_measured(tiny_llama: LlamaForCausalLM) -> None:
    calibration, scored = torch.randint(0, 64, (2, 4, 64)).unbind()
    found = measure(tiny_llama, calibration, scored, claims.all_recipes())
    made = claims.all_claims(found)
    assert len({claim.what for claim in made}) == len(made) == 15
    assert all(math.isfinite(claim.measured) for claim in made)
    by_name = {claim.what: claim for claim in made}
    ratio = found.results["default-3"].kl_mean / found.results["default"].kl_mean
    assert by_name["KL of default-3 / default"].measured == ratio > 1
    quick = claims.quick_claims(found)
    assert {claim.what for claim in quick} <= by_name.keys()


def test_recipes_of_claims_take_keys_at_one_stage() -> None:
    assert {recipe.stage for recipe in claims.all_recipes().values()} == {load_recipe("default").stage}
