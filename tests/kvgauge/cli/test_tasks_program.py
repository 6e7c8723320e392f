"""`evaluate --tasks`, called as a user types it, on the demo model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.programs import save_model, save_tokenizer

from calib.demo import model_folder
from calib.demo import tasks as demo
from calib.demo.draws import Draws
from kvgauge.cli import evaluate

DYNAMIC = "--abits 4 --pertoken k_proj v_proj"
QUICK = f"{DYNAMIC} --task-limit 2 --task-lengths 60"

Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def type_in(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Runs `evaluate` in an empty folder: status, what it printed, and what it said."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = evaluate.main(line.split())
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return call


def found(ran: tuple[int, str, str]) -> dict:
    assert ran[0] == 0, ran[2]
    return json.loads(ran[1])


def test_the_demo_model_finds_passkeys_and_the_file_scores_alike(type_in: Program) -> None:
    report = found(type_in(f"{QUICK} --tasks passkey --task-depths 0,1 --predictions new/p.jsonl --json"))
    result = report["tasks"]["passkey"]
    assert (result["n"], result["fp"], result["quantized_fraction"]) == (2, 1.0, 1.0)
    assert [(cell["words"], cell["depth"]) for cell in result["cells"]] == [(60, 0.0), (60, 1.0)]
    assert "packed cache; the whole prompt in one step" in result["protocol"]
    assert set(report) == {"tasks"}
    assert found(type_in("--score new/p.jsonl --json")) == report
    status, table, _ = type_in("--score new/p.jsonl")
    assert status == 0
    assert "full precision: 1.000" in table
    assert "protocol: packed cache" in table


def test_a_result_holds_the_items_asked_for_not_all_in_the_file(type_in: Program) -> None:
    line = f"{DYNAMIC} --tasks passkey --task-depths 0 --predictions p.jsonl --json"
    found(type_in(f"{line} --task-lengths 40 --task-limit 2"))
    result = found(type_in(f"{line} --task-lengths 60 --task-limit 1"))["tasks"]["passkey"]
    assert (result["n"], [cell["words"] for cell in result["cells"]]) == (1, [60])
    assert found(type_in("--score p.jsonl --json"))["tasks"]["passkey"]["n"] == 3


def test_all_made_tasks_are_solved_by_the_demo_model(type_in: Program) -> None:
    report = found(type_in(f"{QUICK} --tasks synthetic,needle --json"))["tasks"]
    assert list(report) == ["multi_key", "multi_value", "variables", "common_words", "needle"]
    assert sum(result["fp"] for result in report.values()) / 5 >= 0.8
    assert all(result["n"] == 2 for result in report.values())


def test_keys_of_two_bits_forget(type_in: Program) -> None:
    line = "--abits 2 --pertoken k_proj v_proj --task-limit 4 --task-lengths 300 --tasks passkey --json"
    result = found(type_in(line))["tasks"]["passkey"]
    assert result["quantized"] < result["fp"] == 1.0


@pytest.mark.parametrize("task", [demo.passkey, demo.needle])
def test_depth_says_where_the_demo_needle_stands(task: Callable[..., demo.Trial]) -> None:
    first, middle, last = (task(Draws("a"), 300, depth=depth).prompt for depth in (0.0, 0.5, 1.0))
    told = first.partition(". ")[0]
    assert told.startswith(("The pass key is", "The number of the"))
    assert middle.index(told) / len(middle) == pytest.approx(0.5, abs=0.1)
    assert 0.9 < last.index(told) / len(last) < last.index("What is") / len(last)
    assert sorted(first.split()) == sorted(middle.split()) == sorted(last.split())


def test_perplexity_and_tasks_stand_beside_each_other(type_in: Program, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Ada went to the lake with a red kite and a goat. " * 9)
    line = f"{DYNAMIC} --residual-tokens 8 --prefill-tokens 16 --protocol cache --dataset own.txt --limit 1 --seqlen 32"
    both = found(type_in(f"{line} --tasks perplexity,drift --task-limit 1 --task-lengths 24 --json"))
    assert both["quantized"]["perplexity"] > 1
    drift = both["tasks"]["drift"]
    assert drift["fp"] == 1.0
    assert 0 <= drift["quantized"] <= 1
    assert "prefill of 16 tokens" in drift["protocol"]
    assert "last 8 tokens exact" in drift["protocol"]
    assert 0 < drift["quantized_fraction"] < 1


def test_a_model_is_asked_by_its_chat_template(type_in: Program, tmp_path: Path) -> None:
    save_model(tmp_path / "own", eos_token_id=255, max_position_embeddings=600)
    save_tokenizer(tmp_path / "own", eos_token="ÿ", chat_template="<{{ messages[0].content }}>")
    line = f"own {DYNAMIC} --tasks passkey --task-limit 1 --task-lengths 400 --task-format chat --predictions p.jsonl"
    assert found(type_in(f"{line} --json"))["tasks"]["passkey"]["format"] == "chat"
    assert {json.loads(line)["format"] for line in (tmp_path / "p.jsonl").read_text().splitlines()} == {"chat"}
    assert "asked by chat template" in type_in("--score p.jsonl")[1]


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        (f"{QUICK} --tasks passkye", 2, ["perplexity, passkey, needle", "'passkye'", "Did you mean passkey?"]),
        (f"{QUICK}", 2, ["--task-limit, --task-lengths", "add --tasks"]),
        (f"{QUICK} --tasks passkey --residual-tokens 500", 1, ["passkey", "no token was quantized"]),
        (
            f"{DYNAMIC} --tasks passkey --task-limit 1 --task-lengths 1200",
            1,
            ["passkey 1200/0.0/0", "context of 1024", "--maxseqlen"],
        ),
        (f"{DYNAMIC} --tasks passkey --task-lengths 0", 2, ["--task-lengths", "expected an integer from 1"]),
        (f"{DYNAMIC} --tasks passkey --task-depths 2", 2, ["--task-depths", "from 0 to 1"]),
        (f"{DYNAMIC} --tasks gsm8k --task-data none.jsonl", 1, ["none.jsonl", "Check the path"]),
        ("--score none.jsonl", 1, ["none.jsonl", "Check the path"]),
        (f"mute {QUICK} --tasks passkey", 2, ["no tokenizer"]),
        (f"{QUICK} --tasks passkey --task-format chat", 1, ["with a chat template; got one without", "--task-format"]),
        (f"{QUICK} --tasks drift --task-format chat", 2, ["--task-format chat: no effect on drift"]),
    ],
)
def test_what_cannot_be_is_refused(type_in: Program, tmp_path: Path, line: str, status: int, told: list[str]) -> None:
    (tmp_path / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folder() / name, tmp_path / "mute")
    ran = type_in(line)
    assert ran[0] == status
    for phrase in told:
        assert phrase in ran[2]
