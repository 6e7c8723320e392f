"""The training of the demo model, on a few tiny windows: what is logged and written, and that it can be resumed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.demo_model import train as train_demo_model
from scripts.demo_model.train import Phase, Training


@pytest.fixture(autouse=True)
def tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_demo_model, "TOKENIZER_PAGES", 20)
    monkeypatch.setattr(train_demo_model, "PHASES", (Phase(16, 2, 3, 4, 0.5), Phase(32, 1, 2, 4, 0.5)))
    monkeypatch.setattr(train_demo_model, "REPORT_STEPS", 2)
    monkeypatch.setattr(train_demo_model, "LOG_STEPS", 1)
    monkeypatch.setattr(train_demo_model, "TRIALS", 1)
    monkeypatch.setattr(torch, "compile", lambda model: model)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Training(tmp_path / "whole", "cpu", seed=0).run()
    first = Training(tmp_path / "parts", "cpu", seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_update", interrupted_after(2, Training._update))
        with pytest.raises(KeyboardInterrupt):
            first.run()
    second = Training(tmp_path / "parts", "cpu", seed=0)
    second.resume()
    assert second.step == 2
    second.run()
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_is_logged_and_written(tmp_path: Path) -> None:
    assert train_demo_model.main(["--output", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["tokens"], row["window"]) for row in rows] == [
        (1, 32, 16),
        (2, 64, 16),
        (3, 96, 16),
        (4, 128, 32),
        (5, 160, 32),
    ]
    assert ["passkey" in row for row in rows] == [False, True, False, True, True]
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert (tmp_path / "tokenizer.json").exists()


def test_another_seed_gives_other_weights() -> None:
    first, again, other = (train_demo_model.new_model(seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def interrupted_after(steps: int, update):
    def interrupted(self: Training, *args: object) -> None:
        if self.step == steps:
            raise KeyboardInterrupt
        update(self, *args)

    return interrupted
