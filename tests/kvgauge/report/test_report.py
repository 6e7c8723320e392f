"""The report of an evaluation: figures, words, and the page, also looked at in a browser where there is one."""

import copy
import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import random_llama
from PIL import Image
from transformers import LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.manifest import SinkChoice
from artifacts.model.attention import attention_layers
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.quantizers.hadamard import Hadamard
from artifacts.quantizers.sparse import PercentileSparse, ThresholdSparse
from calib import fit, load_recipe
from calib.calibration import add_windows, new_statistics
from kvgauge.cli.options.common import add_text_options, parsed
from kvgauge.cli.options.protocol import add_protocol_options
from kvgauge.cli.options.report import add_report_options, check_report_options
from kvgauge.cli.report import main
from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.report import ReportConfig
from kvgauge.configuration.text import TextConfig
from kvgauge.loading.models import LoadedModel
from kvgauge.report.compared import compared
from kvgauge.report.drawing.numbers import percent, size
from kvgauge.report.findings.views import kept_mask, levels_over_values, static_range
from kvgauge.report.gather import gather
from kvgauge.report.page import page
from kvgauge.report.reported_run import ReportedRun
from kvgauge.report.sections import layers as layer_sections
from kvgauge.report.sections import results as result_sections
from kvgauge.report.sections import storage as storage_sections
from kvgauge.report.sections import tasks as task_sections
from kvgauge.report.verdict import verdict
from kvgauge.running.calibration_text import calibration_windows
from kvgauge.running.evaluated import Evaluated
from kvgauge.terminal.console import Parser, UsageError
from simquant import CachePolicy, evaluate

Found = dict[str, Any]

SECTIONS = ("results", "comparison", "layers", "ranges", "levels", "exact", "drift", "grids", "memory", "provenance")
CHOICE = SinkChoice(reason="1 of at most 2: it pays", errors=[0.25, 0.125, 0.0625], bits=[4.0, 4.006, 4.012])
HOSTILE = "<script>alert('x')</script>\"&"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_llama()


@pytest.fixture(scope="module")
def run(model: LlamaForCausalLM) -> ReportedRun:
    windows = torch.randint(0, 64, (8, 24))
    layers = attention_layers(model)
    statistics = new_statistics(model, layers, corpus="text.txt", seed=0)
    add_windows(model, layers, statistics, windows[:4])
    sparse = {"method": "codebook", "bits": 2, "outliers": {"fraction": 0.05}}
    recipe = load_recipe("kvquant").edited({"key": {**sparse, "per": "channel"}, "value": {**sparse, "per": "token"}})
    fitted = fit(statistics, recipe)
    artifact = Artifact(dict(fitted), replace(fitted.manifest, sink_choice=CHOICE), fitted.ngrams)
    settings = {"policy": CachePolicy(sink_tokens=1)}
    result = evaluate(model, windows[4:], artifact, **settings)
    return ReportedRun(
        loaded=LoadedModel(model, None, None),
        quantizers=artifact,
        settings=settings,
        windows=windows[4:],
        calibration_windows=windows[:4],
        results={"text.txt": result.to_json()},
        tasks={"passkey": _task()},
        model="folder/model",
        command="evaluate folder/model --quantizer-path 'my q.safetensors' --report out",
    )


@pytest.fixture(scope="module")
def gathered(run: ReportedRun) -> Found:
    return json.loads(json.dumps(gather(run), allow_nan=False))


@pytest.fixture(scope="module")
def made(gathered: Found) -> str:
    """The page, which takes a second to draw."""
    return page(gathered)


@pytest.fixture
def found(gathered: Found) -> Found:
    """A copy, to be changed."""
    return copy.deepcopy(gathered)


def _task() -> Found:
    cells = [
        {"length": length, "depth": depth, "n": 2, "fp": 1.0, "quantized": quantized}
        for length, depth, quantized in ((64, 0.0, 1.0), (64, 1.0, 0.5), (96, 0.0, 0.25), (96, 1.0, 0.0))
    ]
    return {
        "task": "passkey",
        "metric": "accuracy",
        "n": 8,
        "fp": 1.0,
        "fp_stderr": 0.0,
        "quantized": 0.4375,
        "quantized_stderr": 0.15,
        "difference": -0.5625,
        "difference_stderr": 0.15,
        "cells": cells,
        "protocol": "packed cache",
    }


def _result(found: Found) -> Found:
    return found["texts"]["text.txt"]


def _visible(*parts: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", " ".join(parts))).replace("\u00a0", " ")


def test_the_page_has_every_section_with_a_heading(made: str) -> None:
    headings = re.findall(r'<section aria-labelledby="(\w+)"><h2 id="(\w+)">[^<]+</h2>', made)
    assert tuple(name for name, _ in headings) == SECTIONS
    assert all(name == heading for name, heading in headings)
    assert re.findall(r'href="#(\w+)">[^<]', made) == list(SECTIONS)


def test_without_tasks_there_is_no_heat_map_of_them(found: Found) -> None:
    assert task_sections.grids(found) is not None
    assert task_sections.grids({**found, "tasks": {}}) is None


def test_tasks_alone_make_a_report(found: Found) -> None:
    alone = {**found, "texts": {}, "memory": []}
    alone["verdict"] = verdict(alone)
    assert alone["verdict"]["headline"].startswith("No text was evaluated. passkey: 1.00 in full precision, 0.438 ")
    assert "0.44 ± 0.15" in _visible(result_sections.verdict_box(alone), result_sections.results(alone))
    assert "No finite loss was measured" in result_sections.comparison(alone)
    assert "nothing was counted" in storage_sections.memory(alone)


def test_tasks_of_the_harness_have_a_table_of_their_own(found: Found) -> None:
    row = {"n": None, "fp": 0.5, "fp_stderr": 0.01, "quantized": 0.25, "quantized_stderr": None}
    metrics = {"acc,none": {**row, "difference": -0.25, "difference_stderr": 0.02}, "bits,none": row}
    found |= {"texts": {}, "tasks": {}, "lm_eval": {"tasks": {"wiki": metrics}, "protocol": "packed cache"}}
    seen = _visible(result_sections.results(found))
    assert re.search(r"wiki, acc,none\s+unknown\s+0\.500 ± 0\.010\s+0\.250\s+−0\.250 ± 0\.020", seen)
    assert re.search(r"wiki, bits,none\s+unknown\s+0\.500 ± 0\.010\s+0\.250\s+unknown", seen)
    assert "wiki, acc,none: 0.500 in full precision, 0.250 quantized." in verdict(found)["headline"]


def test_the_json_alone_gives_the_same_page_again(gathered: Found, made: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(gathered))
    (tmp_path / "report.html").write_text("an earlier one")
    assert main([str(tmp_path / "report.json")]) == 0
    assert (tmp_path / "report.html").read_text() == made
    assert json.loads((tmp_path / "report.json").read_text()) == gathered
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_json_that_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert main([str(tmp_path / "other.json")]) == 2
    assert "other.json: not a report; expected the report.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_figures_of_the_page_are_those_of_the_json(found: Found) -> None:
    result = _result(found)
    result["fp"]["perplexity"], result["fp"]["perplexity_stderr"] = 12.345678, 0.0456
    result["loss_nats"], result["loss_nats_stderr"] = 0.98765, 0.0123
    found["sites"]["layers.1.value"]["loss_share"] = 0.4321
    found["sites"]["layers.0.key.pre_rope"]["logit_error"] = 0.06543
    found["sites"]["layers.0.value"]["kept_fraction"] = 0.0789
    found["memory"][0]["total_bytes"] = 12345678
    seen = _visible(
        result_sections.results(found),
        layer_sections.layers(found),
        layer_sections.drift(found),
        storage_sections.memory(found),
    )
    for figure in ("12.346 ± 0.046", "0.988 ± 0.012", "43 %", "6.5 %", "7.9 %", "11.8 MiB"):
        assert figure in seen, figure


def test_what_a_token_costs_stands_beside_the_bits(found: Found, run: ReportedRun) -> None:
    costs, static = _result(found)["costs"], sum(own.static_bytes for own in run.quantizers.values())
    assert costs["decode_multiply_adds"] == sum(own.decode_multiply_adds for own in run.quantizers.values())
    costs |= {"bits_per_token": 1234.4, "static_share": 0.098, "model_multiply_adds": 32000}
    seen = _visible(result_sections.results(found))
    share = percent(costs["decode_multiply_adds"] / 32000)
    for words in ("1,234 bits stored", f"multiply-adds, {share} of the linear", f"{size(static)} 9.8 % of the weights"):
        assert words in re.sub(r"\s+", " ", seen), words
    costs["model_multiply_adds"] = 0
    assert "of the linear" not in _visible(result_sections.results(found))


def test_nothing_is_asked_of_the_network(made: str) -> None:
    assert not re.search(r"https?:|src=|<script|<link|@import|url\((?!#)", made)
    assert not re.findall(r'href="(?!#)', made)


def test_names_inside_the_page_are_unique_and_those_referred_to_exist(made: str) -> None:
    names = re.findall(r'\bid="([^"]+)"', made)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', made)) <= set(names)


def test_what_comes_from_outside_is_escaped(found: Found) -> None:
    found["command"] = found["origins"]["model"]["name"] = found["drift"] = HOSTILE
    found["texts"] = {HOSTILE: _result(found), "other": _result(found)}
    found["tasks"] = {HOSTILE: {**_task(), "task": HOSTILE, "metric": HOSTILE, "protocol": HOSTILE}}
    found |= {"ranges": [], "levels": {}, "kept_by_channel": {}}  # pictures without words from outside
    found["comparison"] = {
        "file": HOSTILE,
        "text": HOSTILE,
        "fp_perplexity": 3.0,
        "same_text": False,
        "points": [{"name": HOSTILE, "bits": 3.0, "loss_nats": 0.1, "loss_nats_stderr": 0.01}],
    }
    found["verdict"] = verdict(found)
    made = page(found)
    assert "<script" not in made
    assert "&lt;script&gt;" in made
    assert not re.search(r'aria-label="[^"]*<', made)


def test_colours_come_from_the_style_sheet(made: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", made, re.DOTALL))
    assert not re.search(r"(?:fill|stroke): ?#", drawn)
    assert "var(--c0)" in drawn
    assert "<text" in drawn, "text is text, no outlines"


def test_heat_maps_carry_their_figures(made: str) -> None:
    cells = re.findall(r'<td class="heat"[^>]*>([^<]*)</td>', made.replace("\u00a0", " "))
    assert cells
    assert all(re.search(r"\d", cell) for cell in cells)
    assert "0.25, n = 2" in cells


LOSSES = [
    (0.04, 0.006, "cost", "cost 0.0400 ± 0.0060 nats per token, +4.1 % perplexity"),
    (
        0.004,
        0.006,
        "none",
        "no loss can be told from zero, 0.0040 ± 0.0060 nats per token. Up to 0.016 nats cannot",
    ),
    (-0.004, 0.006, "none", "from zero, −0.0040 ± 0.0060 nats per token. Up to 0.0080 nats cannot"),
    (-0.04, 0.006, "better", "seem better than full precision: −0.0400 ± 0.0060 nats per token, −3.9 % perplexity"),
    (0.04, None, "unknown", "One window tells no standard error"),
    (None, None, "broken", "the loss is not a finite number"),
]


@pytest.mark.parametrize(("loss", "stderr", "state", "words"), LOSSES, ids=[f"{row[2]} {row[0]}" for row in LOSSES])
def test_the_verdict_says_what_the_loss_is(
    found: Found, loss: float | None, stderr: float | None, state: str, words: str
) -> None:
    result = _result(found)
    after = None if loss is None else 8.0 * float(np.exp(loss))
    rise = None if loss is None else float(np.expm1(loss))
    result |= {"loss_nats": loss, "loss_nats_stderr": stderr, "perplexity_rise": rise}
    result["fp"]["perplexity"], result["quantized"]["perplexity"] = 8.0, after
    own = verdict(found)
    assert own["state"] == state
    assert words in own["headline"]
    notes = " ".join(own["notes"])
    assert ("which is noise" in notes) == (state == "none" and loss is not None and loss < 0)
    assert ("or a bug" in notes) == (state == "better")
    assert words in _visible(result_sections.verdict_box({**found, "verdict": own}))


def test_the_verdict_names_the_site_that_loses_most(found: Found) -> None:
    _result(found).update(loss_nats=0.03, loss_nats_stderr=0.001)
    for row in found["sites"].values():
        row.update(loss_nats=0.001, loss_nats_stderr=0.001, loss_share=0.1)
    found["sites"]["layers.1.key.pre_rope"].update(loss_nats=0.025, loss_share=0.6)
    assert "The keys of layer 1 carry 60 % of it: 0.0250 ± 0.0010 nats when quantized alone." in verdict(found)["notes"]
    _result(found)["loss_nats"] = 0.3
    assert any("one by one the sites lose 0.0280 nats, all at once 0.300" in note for note in verdict(found)["notes"])
    found["sites"]["layers.1.key.pre_rope"]["loss_nats_stderr"] = 0.02
    assert any("No single site stands out of the noise" in note for note in verdict(found)["notes"])


def test_the_verdict_warns(found: Found) -> None:
    result = _result(found)
    result.update(quantized_fraction=0.25, n_windows=4, protocol="full; NOT CAUSAL: scales look at later tokens")
    found["drift"] = "5 % lie outside"
    warnings = " ".join(verdict(found)["warnings"])
    for words in ("5 % lie outside.", "no cache can do", "only 25 % of the cached tokens", "4 windows are few"):
        assert words in warnings
    assert "where guessing evenly among 64 tokens has 64" in warnings  # the model is random
    result.update(quantized_fraction=1.0, n_windows=40, protocol="full", warnings=[])
    assert verdict({**found, "drift": None})["warnings"] == []


def test_why_so_many_first_tokens_are_exact(found: Found) -> None:
    """Told where calibration chose their number, and not where it was given."""
    assert found["sink_choice"] == asdict(CHOICE)
    words = re.sub(r"\s+", " ", _visible(layer_sections.exact(found)))
    assert f"Chosen by calibration: {CHOICE.reason}." in words
    assert "first tokens exact 0 1 2 squared error, relative 0.250 0.125 0.0625 bits a value 4.000 4.006 4.012" in words
    without = _visible(layer_sections.exact({**found, "sink_choice": None}))
    assert "Chosen by calibration" not in without
    silent = _visible(layer_sections.exact({**found, "sink_choice": {**asdict(CHOICE), "errors": [], "bits": []}}))
    assert CHOICE.reason in silent
    assert "squared error, relative" not in silent


def test_an_exact_cache_is_said_to_be_exact(found: Found) -> None:
    _result(found).update(loss_nats=0.0, loss_nats_stderr=0.0, kl_mean=0.0, kl_mean_stderr=0.0)
    own = verdict(found)
    assert own["state"] == "none"
    assert own["headline"].endswith("It is zero on every window.")
    assert "The distributions are those of full precision." in own["notes"]


def test_sites_are_measured_and_their_shares_add_up(found: Found, run: ReportedRun) -> None:
    assert list(found["sites"]) == [str(site) for site in run.quantizers]
    shares = [row["loss_share"] for row in found["sites"].values()]
    assert sum(shares) == pytest.approx(1)
    assert all(row["output_error"] > 0 for row in found["sites"].values())
    assert all((row["clipped_fraction"] is None) == ("value" in name) for name, row in found["sites"].items())
    assert found["sites"]["layers.0.key.pre_rope"]["calibrated_clipped_fraction"] is not None


def test_a_key_after_rotation_has_no_static_range(found: Found) -> None:
    stages = {row["stage"]: row for row in found["ranges"]}
    assert set(stages) == {"pre_rope", "post_rope", ""}
    assert stages["pre_rope"]["static_low"] is not None
    assert stages["post_rope"]["static_low"] is None
    assert stages[""]["static_low"] is None
    for row in found["ranges"]:
        ends = zip(row["minimum"], row["inner_low"], row["inner_high"], row["maximum"], strict=True)
        assert all(list(own) == sorted(own) for own in ends)


def test_memory_is_what_was_counted(found: Found, run: ReportedRun) -> None:
    row = found["memory"][0]
    bits = _result(found)["bits"]["amortised"]["2048"]
    values = 2048 * 2 * 16  # tokens, layers, channels
    assert row["context_tokens"] == 2048
    assert row["exact_16_bit_bytes"] == 2 * 2 * values
    assert row["total_bytes"] == pytest.approx((bits["key"] + bits["value"]) * values / 8, abs=1)
    assert row["static_bytes"] == sum(quantizer.static_bytes for quantizer in run.quantizers.values())


def test_norms_of_the_first_positions_are_told_beside_later_ones(found: Found, run: ReportedRun) -> None:
    values: list[torch.Tensor] = []
    hook = run.loaded.model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *seen: values.append(seen[2]))
    with torch.no_grad():
        for window in run.windows:
            run.loaded.model(window[None])
    hook.remove()
    norms = torch.cat(values).norm(dim=2).mean(dim=0)
    row = found["norms"]["layers.0.value"]
    assert row["later_median"] == pytest.approx(float(norms[8:].median()), rel=1e-4)
    np.testing.assert_allclose(row["first_over_later"], norms[:8] / row["later_median"], rtol=1e-4)


def test_the_static_range_of_a_grid_is_that_of_its_codes() -> None:
    grid = Affine(channels=3, bits=2, scale=torch.tensor([1.0, 2.0, 0.5]), offset=torch.tensor([-1.0, 0.0, 4.0]))
    reach = static_range(grid)
    assert reach is not None
    assert [end.tolist() for end in reach] == [[-1, 0, 4], [2, 6, 5.5]]
    thresholds = ThresholdSparse(channels=3, inner=grid, lower=torch.full((3,), -9.0), upper=torch.full((3,), 9.0))
    outer = static_range(thresholds)
    assert outer is not None
    assert outer[1].tolist() == [9, 9, 9]
    assert static_range(Hadamard(channels=4, group_size=4, inner=_codebook())) is None


def _codebook() -> Codebook:
    levels = torch.tensor([[-1.0, -0.25, 0.5, 1.0]], dtype=torch.float16)
    return Codebook(channels=4, bits=2, scale=torch.arange(1.0, 5), offset=torch.ones(4), levels=levels)


def test_levels_are_those_of_the_channel_with_the_largest_error() -> None:
    x = torch.randn(200, 4) * torch.tensor([0.1, 0.1, 4.0, 0.1]) + 1
    row = levels_over_values(_codebook(), x)
    assert row is not None
    assert row["channel"] == 2
    assert row["levels"] == [1 - 3, 1 - 0.75, 1 + 1.5, 1 + 3]
    assert sum(row["shares"]) == pytest.approx(1)
    assert row["low"] <= min(float(x[:, 2].min()), -2)


def test_levels_behind_a_transform_are_over_transformed_values() -> None:
    x = torch.randn(64, 4)
    outer = Hadamard(channels=4, group_size=4, inner=_codebook())
    row, inner = levels_over_values(outer, x), levels_over_values(_codebook(), outer.transform(x))
    assert row is not None
    assert inner is not None
    assert row["shares"] == inner["shares"]
    assert row["what"] == f"{inner['what']}, hadamard"


def test_values_that_are_kept_are_found_behind_a_transform() -> None:
    x = torch.randn(16, 4)
    sparse = PercentileSparse(channels=4, inner=_codebook(), outlier_fraction=0.25)
    outer = Hadamard(channels=4, group_size=4, inner=sparse)
    mask = kept_mask(outer, x)
    assert mask is not None
    assert torch.equal(mask, sparse.mask(outer.transform(x)))
    assert kept_mask(_codebook(), x) is None


def test_tokens_that_are_kept_are_among_the_kept_values_and_over_no_levels() -> None:
    x = 5 + torch.randn(16, 4)
    x[::4] = 0.01
    sparse = PercentileSparse(channels=4, inner=_codebook(), outlier_fraction=0.25)
    outer = ExactSinks(channels=4, inner=sparse, least_norm=torch.ones(1))
    mask, small = kept_mask(outer, x), x.norm(dim=1) < 1
    assert mask is not None
    assert torch.equal(mask, sparse.mask(x) | small[:, None])
    assert levels_over_values(outer, x) == levels_over_values(sparse, x[~small])
    assert levels_over_values(outer, x[small]) is not None
    plain = ExactSinks(channels=4, inner=_codebook(), least_norm=torch.ones(1))
    assert kept_mask(plain, x)[:, 0].tolist() == small.tolist()
    assert [end.tolist() for end in static_range(plain)] == [end.tolist() for end in static_range(_codebook())]


def _comparison(path: Path, perplexity: float) -> Path:
    recipes = [
        {"name": name, "bits": {"average": bits}, "loss_nats": nats, "loss_nats_stderr": stderr}
        for name, bits, nats, stderr in (("a", 2.0, 0.5, 0.1), ("b", 4.0, 0.1, None), ("c", 1.0, None, None))
    ]
    path.write_text(json.dumps({"recipes": recipes, "perplexity": perplexity, "evaluation": {"text": "wiki"}}))
    return path


def test_recipes_of_a_comparison_stand_beside_the_run(found: Found, tmp_path: Path) -> None:
    result = _result(found)
    same = compared(_comparison(tmp_path / "same.json", result["fp"]["perplexity"]), result)
    other = compared(_comparison(tmp_path / "other.json", 2 * result["fp"]["perplexity"]), result)
    assert (same["same_text"], other["same_text"]) == (True, False)
    shown = {own["file"]: _visible(result_sections.comparison({**found, "comparison": own})) for own in (same, other)}
    assert "with the same full-precision perplexity" in shown["same.json"]
    assert "OTHER WINDOWS OR MODEL" in shown["other.json"]
    assert re.search(r"\bb\s+4\.00\s+0\.100", shown["same.json"])


@pytest.mark.parametrize("text", ["", "[]", '{"recipes": [{"name": "a"}]}'])
def test_another_file_is_no_comparison(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=r"x\.json: expected results\.json of `kvgauge compare`"):
        compared(tmp_path / "x.json", None)
    with pytest.raises(UsageError, match="missing"):
        compared(tmp_path / "missing.json", None)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--report-compare", "r.json"], "--report-compare: no effect without a report"),
        (["--report", "out", "--report-compare", "r.json"], "r.json: "),
        (["--report", "file/out"], "--report file/out: cannot make this folder"),
    ],
)
def test_what_cannot_become_a_report_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    parser = Parser("evaluate")
    add_report_options(parser)
    check_report_options(parsed(ReportConfig, parser.parse_args([])))
    with pytest.raises(UsageError, match=re.escape(problem)):
        check_report_options(parsed(ReportConfig, parser.parse_args(words)))


def test_calibration_windows_are_found_again_by_their_digest(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 20)
    loaded = LoadedModel(model, _tokenize, None)
    artifact = _calibrated(loaded, path)
    text = TextConfig(dataset=f"demo,{path}")
    windows = calibration_windows(text, loaded, artifact)
    assert windows is not None
    assert windows.shape == (3, 16)
    assert calibration_windows(TextConfig(dataset="other.txt"), loaded, artifact) is None
    path.write_text("pack my box with five dozen liquor jugs " * 20)
    assert calibration_windows(text, loaded, artifact) is None


def test_a_run_is_put_together_from_what_evaluate_has(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "my text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 20)
    loaded = LoadedModel(model, _tokenize, None)
    evaluated = Evaluated(quantizers=_calibrated(loaded, path), sink_tokens=2)
    argv = ["--dataset", str(path), "--seqlen", "16", "--report", "out", "--report-windows", "5"]
    parser = Parser("evaluate")
    for add in (add_text_options, add_protocol_options, add_report_options):
        add(parser)
    config = parsed(EvaluateConfig, parser.parse_args(argv)).of_model("folder/model")
    run = ReportedRun.of(config, argv, loaded, evaluated, {"loss_nats": 0.5, "tasks": {"passkey": _task()}})
    assert run.windows.shape == (5, 16)
    assert run.results == {str(path): {"loss_nats": 0.5}}
    assert run.tasks == {"passkey": _task()}
    assert run.command == f"evaluate --dataset '{path}' --seqlen 16 --report out --report-windows 5"
    assert run.settings["policy"].sink_tokens == 2
    assert run.calibration_windows is not None
    assert ReportedRun.of(config, argv, loaded, evaluated, {"tasks": {}}).results == {}


def _tokenize(text: str, verbose: bool) -> Any:
    return SimpleNamespace(input_ids=[ord(letter) % 64 for letter in text])


def _calibrated(loaded: LoadedModel, path: Path) -> Artifact:
    from calib import load_corpus, sample_windows

    corpus = load_corpus(str(path), "calibration", loaded.encode)
    layers = attention_layers(loaded.model)
    statistics = new_statistics(loaded.model, layers, corpus=corpus.name, seed=3)
    add_windows(loaded.model, layers, statistics, sample_windows(corpus, n_windows=3, seqlen=16, seed=3))
    return fit(statistics, load_recipe("kvquant-3"))


MEASURE = """<!doctype html><meta charset="utf-8"><body><script>
const found = {}, widths = [390, 1280];
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `border:0;width:${width}px;height:800px`;
  frame.onload = () => {
    const inside = frame.contentDocument.documentElement;
    const asked = frame.contentWindow.performance.getEntriesByType("resource").length;
    found[width] = [inside.scrollWidth, inside.clientWidth, asked, frame.contentDocument.images.length];
    if (Object.keys(found).length === widths.length) document.body.dataset.found = JSON.stringify(found);
  };
  frame.srcdoc = PAGE;
  document.body.append(frame);
}
</script>"""


def _chromium(page_url: str, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    return subprocess.run(
        [CHROMIUM, *flags, offline, *options, page_url], capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_a_browser_shows_the_page_in_full_width_and_asks_for_nothing(made: str, tmp_path: Path) -> None:
    inside = json.dumps(made).replace("</", "<\\/")
    (tmp_path / "measure.html").write_text(MEASURE.replace("PAGE", inside), encoding="utf-8")
    seen = _chromium((tmp_path / "measure.html").as_uri(), f"--user-data-dir={tmp_path / 'user'}", "--dump-dom")
    noted = re.search(r'<body data-found="([^"]*)"', seen.stdout)
    assert noted, seen.stderr
    widths: Mapping[str, list[int]] = json.loads(html.unescape(noted[1]))
    for width, (needed, given, n_requests, n_images) in widths.items():
        assert (given, n_requests, n_images) == (int(width), 0, 0)
        assert needed <= given, f"at {width} pixels the page scrolls sideways"
    assert ":CONSOLE" not in seen.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_a_browser_shows_the_page_light_and_dark(made: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(made, encoding="utf-8")
    grounds = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        options = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1280,1600", f"--screenshot={shot}")
        _chromium((tmp_path / "report.html").as_uri(), f"--user-data-dir={tmp_path / 'user'}", *options)
        pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
        grounds[name] = pixels[0, 0]
        assert pixels.std() > 5, f"{name}: the page is blank"
        assert np.ptp(pixels) > 150, f"{name}: text does not stand out"
    assert grounds["dark"] < 64 < 192 < grounds["light"]
