"""The bundled model: small, found without a name, able to look things up, and with keys that need their own scales."""

import json
from pathlib import Path

import pytest
import torch

from artifacts import load
from calib.demo import model_folder
from calib.demo.trials import is_solved, trials
from kvgauge.cli import calibrate, demo, evaluate
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import LoadedModel, load_model
from scripts.demo_model.measure import key_losses


def loaded(dtype: str = "auto") -> LoadedModel:
    return load_model(ModelConfig(model="demo", device="cpu", dtype=dtype))


@pytest.fixture(scope="module")
def bundled() -> LoadedModel:
    return loaded()


def test_the_package_data_is_small() -> None:
    assert sum(file.stat().st_size for file in model_folder().rglob("*")) <= 8_000_000


def test_the_shape_shows_grouped_queries_over_a_long_context(bundled: LoadedModel) -> None:
    layers = bundled.layers()
    assert len(layers) >= 4
    assert bundled.context >= 1024
    for layer in layers:
        assert layer.q_heads >= 3 * layer.kv_heads
        assert layer.head_dim >= 32
        assert layer.channels >= 64


def test_it_runs_in_float32_unless_told_otherwise(bundled: LoadedModel) -> None:
    assert {p.dtype for p in bundled.model.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded("bfloat16").model.parameters()} == {torch.bfloat16}


def test_it_finds_a_passkey_in_nine_hundred_tokens(bundled: LoadedModel) -> None:
    drawn = list(trials("passkey", 880, 20))
    assert all(850 < len(bundled.encode(trial.prompt)) < 1000 for trial in drawn)
    assert sum(is_solved(bundled.model, bundled.tokenizer, trial) for trial in drawn) >= 18


def test_keys_lose_more_by_token_than_by_channel(bundled: LoadedModel) -> None:
    """Few windows: the static loss is then within its error of zero, so the divergence stands in for its ratio."""
    found = key_losses(bundled, n_windows=6)
    assert found["loss"]["per_token"][0] >= 3 * found["loss"]["per_channel"][0]
    assert found["kl"]["per_token"] >= 3 * found["kl"]["per_channel"]


def test_the_card_tells_what_was_measured() -> None:
    folder = model_folder().parent
    measured = json.loads((folder / "training" / "figures.json").read_text())
    card = " ".join((folder / "README.md").read_text().split())
    assert measured["passkey"]["share"] >= 0.95
    assert measured["keys_3_bits"]["ratio"] >= 3
    assert f"{measured['parameters']:,} parameters" in card
    assert f"{100 * measured['passkey']['share']:.2f} % of {measured['passkey']['trials']} trials" in card
    for shares in measured["tasks"].values():
        assert "| " + " | ".join(f"{100 * shares[words]:.0f} %" for words in ("100", "300", "800")) + " |" in card


def test_both_commands_work_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibrate.main(["calibrate", "--nsamples", "4", "--nuq", "--quantizer-path", "q.pkl"][1:]) == 0
    assert "Next: evaluate demo --quantizer-path q.pkl" in capsys.readouterr().out
    manifest = load("q.pkl").manifest
    assert (manifest.model_id, manifest.corpus.name) == ("demo", "demo")
    assert evaluate.main(["evaluate", "--quantizer-path", "q.pkl", "--limit", "2", "--json"][1:]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantized_fraction"] == 1
    assert 0 < found["kl_mean"] < 0.02


def test_the_demo_prints_a_table_and_where_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--limit", "2"]) == 0
    ran = capsys.readouterr()
    assert [row.split()[0] for row in ran.out.splitlines()[1:5]] == ["exact", "4", "3", "2"]
    assert "artifact inspect runs/demo/nuq4.safetensors" in ran.out
    assert ran.err.count("$ calibrate") == ran.err.count("$ evaluate") == 3
    assert (tmp_path / "runs/demo/nuq2.safetensors").exists()
    rows = json.loads((tmp_path / "runs/demo/results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["4 bits", "3 bits", "2 bits"]
    assert demo.table(demo.BITS, rows) in ran.out
