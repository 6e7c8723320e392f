"""The matrix of model families: what it says of families that once were refused, and of what must be refused."""

import json
from pathlib import Path

import pytest

from scripts.families import __main__ as program
from scripts.families.trial import outcome

MENDED = {
    "nanochat": ("applied", "2 of 2"),
    "jamba": ("applied", "1 of 5"),
    "lfm2": ("applied", "1 of 2"),
    "nemotron": ("applied", "2 of 2"),
    "qwen3_5_text": ("applied", "1 of 4"),
    "recurrent_gemma": ("applied", "1 of 3"),
    "gemma3n_text": ("simulated", "5 of 10"),
    "xlm": ("simulated", "2 of 2"),
}
REASONS = {
    "deepseek_v3": ("refused", "multi-head latent attention"),
    "mamba": ("refused", "has a running state and no keys and values"),
    "musicgen": ("not built", "AttributeError"),
}


@pytest.mark.parametrize("family", MENDED)
@pytest.mark.filterwarnings("ignore")
def test_families_that_were_refused(family: str) -> None:
    found = outcome(family)
    assert (found.verdict, found.layers) == MENDED[family], found.why


@pytest.mark.parametrize("family", REASONS)
@pytest.mark.filterwarnings("ignore")
def test_families_that_must_be_refused(family: str) -> None:
    found = outcome(family)
    assert found.verdict == REASONS[family][0]
    assert REASONS[family][1] in found.why


def test_the_program_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "apart", outcome)  # it forks, which a process with threads must not
    assert program.main(["musicgen_m", "--json", str(tmp_path / "found.json")]) == 0
    written = json.loads((tmp_path / "found.json").read_text())
    (row,) = written["families"]
    assert (row["name"], row["verdict"], written["counts"]) == ("musicgen_melody", "not built", {"not built": 1})
    assert row["why"] in capsys.readouterr().out
