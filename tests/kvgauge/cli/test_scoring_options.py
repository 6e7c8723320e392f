"""The options of scoring on the demo model: strides, resumption, and figures of single sites."""

from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.artifact import Artifact
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.sites import Site
from calib import calibrate
from calib.calibration import add_windows, new_statistics
from calib.fitting.fit import fit
from calib.recipe.recipe import load_recipe
from calib.text.corpus import Corpus, LazyDocuments, load_corpus
from calib.text.windows import sample_windows, split_windows
from kvgauge.cli.options.scoring import add_scoring_options
from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.fields import filled
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import LoadedModel, load_model
from kvgauge.running.evaluate_text import scored_windows, scoring_settings
from kvgauge.running.site_figures import site_figures
from kvgauge.terminal.console import Parser, UsageError
from simquant import CachePolicy
from simquant.evaluation import clipping
from simquant.evaluation.scored_targets import strided_windows

TEXT = Corpus(name="text", documents=(torch.arange(100), torch.arange(50)), digest="")


def parsed(*words: str, **others: Any) -> EvaluateConfig:
    parser = Parser("evaluate")
    add_scoring_options(parser)
    return filled(EvaluateConfig, {"dataset": "demo", **vars(parser.parse_args(list(words))), **others})


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelConfig(model="demo", device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def artifact(loaded: LoadedModel) -> Artifact:
    """What `calibrate` gives with few windows of the demo text."""
    windows = sample_windows(load_corpus("demo", "calibration", loaded.encode), n_windows=4, seqlen=128, seed=7)
    statistics = new_statistics(loaded.model, loaded.layers(), stage="pre_rope", tier="basic", corpus="demo", seed=7)
    add_windows(loaded.model, loaded.layers(), statistics, windows)
    return fit(statistics, load_recipe("kvquant-2-1pct"))


def test_windows_lie_side_by_side_unless_a_stride_is_given() -> None:
    windows, scored = scored_windows(parsed(limit=3).scoring, TEXT, 20)
    assert torch.equal(windows, split_windows(TEXT, seqlen=20, limit=3))
    assert scored is None
    windows, scored = scored_windows(parsed("--stride", "7", limit=20).scoring, TEXT, 20)
    expected = strided_windows(TEXT.documents, seqlen=20, stride=7, limit=20)
    assert torch.equal(windows, expected[0])
    assert scored is not None
    assert scored.n_scored == expected[1].n_scored
    with pytest.raises(UsageError, match="--stride 21: longer than a window of 20 tokens"):
        scored_windows(parsed("--stride", "21").scoring, TEXT, 20)


def test_a_text_too_long_to_be_read_is_not_read_whole() -> None:
    read: list[str] = []
    documents = LazyDocuments([str(n) for n in range(5000)], lambda text: read.append(text) or [int(text)] * 30)
    windows, _ = scored_windows(parsed("--stride", "10").scoring, Corpus(name="c4", documents=documents, digest=""), 20)
    assert len(windows) == 256
    assert len(read) < 300


def test_a_log_is_of_one_text(tmp_path: Path) -> None:
    config = parsed("--resume", str(tmp_path / "log.jsonl")).scoring
    assert scoring_settings(config, None)["log"].path == tmp_path / "log.jsonl"
    assert scoring_settings(parsed().scoring, None, n_datasets=2) == {"scored": None, "log": None}
    with pytest.raises(UsageError, match="the log holds the windows of one text"):
        scoring_settings(config, None, n_datasets=2)


def test_sites_are_told_apart_in_print_and_json(
    loaded: LoadedModel, artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    windows, _ = scored_windows(parsed(limit=2).scoring, load_corpus("demo", "evaluation", loaded.encode), 128)
    config = parsed("--site-losses", "2", "--clipping")
    found = site_figures(config, loaded, artifact, windows, {"policy": CachePolicy(), "protocol": "full"})
    assert set(found["site_losses"]) == {str(site) for site in artifact}
    assert sum(row["share"] for row in found["site_losses"].values()) == pytest.approx(1)
    keys = [row for site, row in found["clipped"].items() if "key" in site]
    assert all(0.005 < row["calibration"] < 0.02 for row in keys)  # 1 % is left out of each channel
    out, err = capsys.readouterr()
    assert "nats per token" in out
    assert "of the calibration text" in out
    assert "warning" not in err


def test_text_unlike_the_calibration_text_is_warned_of(
    loaded: LoadedModel, artifact: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipping, "_RISE", 1)  # 512 calibration tokens leave much room for chance
    same = torch.full((1, 128), 17)
    site_figures(parsed("--clipping"), loaded, artifact, same, {"policy": CachePolicy()})
    assert "outside of the calibrated range" in capsys.readouterr().err


def test_without_the_calibration_text_its_share_is_unknown(loaded: LoadedModel) -> None:
    windows = torch.randint(0, 64, (2, 64))
    own = calibrate(loaded.model, windows, "kvquant", bits=3)  # from tokens that no corpus holds
    found = site_figures(parsed("--clipping"), loaded, own, windows, {"policy": CachePolicy()})
    assert {row["calibration"] for row in found["clipped"].values()} == {None}
    assert max(row["evaluation"] for row in found["clipped"].values()) < 0.001


def test_dynamic_scales_have_no_range_to_leave(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    dynamic = {
        site: DynamicAffine(channels=layer.channels, bits=4)
        for layer in loaded.layers()
        for site in (Site(layer.layer, "key", "pre_rope"), Site(layer.layer, "value"))
    }
    found = site_figures(parsed("--clipping"), loaded, dynamic, torch.zeros(1, 8).long(), {"policy": CachePolicy()})
    assert found == {"clipped": {}}
    assert "no range is static" in capsys.readouterr().out
    assert site_figures(parsed(), loaded, dynamic, torch.zeros(1, 8).long(), {}) == {}
