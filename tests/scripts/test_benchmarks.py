"""The benchmark programs run on tiny sizes, and their rows tell met targets from missed ones; no time is asserted."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from helpers.models import random_llama

from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from calib import calibrate, fit, load_recipe
from kvgauge.running.machine import hardware
from scripts.bench import cache as bench_cache
from scripts.bench import calibrate as bench_calibrate
from scripts.bench import fit as bench_fit
from scripts.bench import simulate as bench_simulate
from scripts.bench.cache import eigen, predictive
from scripts.bench.ratio import HEADER, Measured, company, company_row, seconds
from scripts.bench.synthetic import model_statistics
from scripts.results.schema import load
from scripts.results.tables import results_text


@pytest.mark.parametrize(
    ("target", "ratio", "verdict"),
    [
        ({"at_least": 4}, "4.000", "at least 4: ok"),
        ({"at_least": 4.1}, "4.000", "at least 4.1: missed"),
        ({"at_most": 0.25}, "0.250", "at most 0.25: ok"),
        ({"at_most": 0.2}, "0.250", "at most 0.2: missed"),
        ({}, "0.250", "none"),
    ],
)
def test_a_row_compares_in_the_direction_of_its_target(target: dict[str, float], ratio: str, verdict: str) -> None:
    line = str(Measured("fit", 0.5, 2.0, **target))
    assert line.split()[:6] == ["fit", "0.5", "s", "2", "s", ratio]
    assert line.endswith(verdict)
    assert line.index(verdict) == HEADER.index("target")


def test_the_machine_is_named() -> None:
    assert f"torch {torch.__version__}" in hardware()


def test_the_least_of_the_repeats_counts() -> None:
    naps = iter([0.05, 0.0, 0.05])
    assert seconds(lambda: time.sleep(next(naps)), repeats=3) < 0.04


def test_company_keeps_a_core_busy_and_leaves_with_the_block() -> None:
    before = psutil.Process().children()
    with company():
        [busy] = [child for child in psutil.Process().children() if child not in before]
        deadline = time.monotonic() + 30
        while sum(busy.cpu_times()[:2]) < 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sum(busy.cpu_times()[:2]) >= 0.1
    assert not busy.is_running()


def test_work_in_company_is_compared_with_the_idle_machine() -> None:
    line = str(company_row("nap", lambda: time.sleep(0.02), idle=1.0))
    assert line.startswith("nap, in company / idle ")
    assert line.endswith("at most 2.5: ok")


def test_bench_fit_prints_a_row_for_every_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_fit, "seconds_more_at_first", lambda: 1.5)  # it starts processes, and compiles
    options = ["--tokens", "64", "--heads", "1", "--layers", "3", "--jobs", "1", "--models", "Llama-3-8B"]
    assert bench_fit.main([*options, "--recipes", "default", "predictive"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [hardware(), HEADER]
    assert [line.rsplit(":", 1)[0].rsplit("  ", 1)[1] for line in lines[2:]] == [
        "at least 100",
        "at least 30",
        "at most 1",
        "none",
        "at most 1",
        *2 * ["at most 1", "at most 1", "at most 2.5"],
    ]
    assert lines[6].startswith("compiling at the first fit, kept on disk / limit")
    assert lines[7].startswith("6 sites of 128 channels, recipe default / limit")
    assert lines[8].startswith("6 sites of 128 channels, recipe default, peak memory")
    assert lines[9].startswith("6 sites of 128 channels, recipe default, in company / idle")
    assert lines[10].startswith("6 sites of 128 channels, recipe predictive / limit")


def test_bench_calibrate_prints_a_row_for_every_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_calibrate, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    assert bench_calibrate.main(["--tokens", "16", "--heads", "1", "--windows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [hardware(), HEADER]
    assert [line[:25] for line in lines[2:]] == [
        "1 windows, basic / bare  ",
        "1 windows, full / bare   ",
        "peak memory, 4 / 1 window",
    ]


def test_bench_calibrate_takes_a_real_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "generation_config.json").unlink(missing_ok=True)
    assert bench_calibrate.main(["--model", str(tmp_path / "tiny"), "--tokens", "16", "--windows", "1"]) == 0
    what = ("basic / forward", "full, Fisher / forward and backward")
    assert [line.rsplit(" at most ", 1)[0][:58].rstrip() for line in capsys.readouterr().out.splitlines()[2:]] == [
        f"tiny, 1 windows, {name}"[:58] for part in what for name in (part, f"{part}, in company / idle")
    ]


def test_bench_simulate_prints_a_row_for_every_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_simulate, "shipped_recipes", lambda: ["default", "kivi-2", "predictive", "quarot-4"])
    assert bench_simulate.main(["--tokens", "64", "--heads", "1", "--windows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [hardware(), HEADER]
    assert [line.rsplit("  ", 1)[1].partition(":")[0] for line in lines[2:]] == [
        "at most 1",
        "none",
        "none",
        *["at most 1"] * 3,  # predictions need earlier tokens, and are left out
        "at most 1.3",
        "at most 1.3",
    ]


def test_a_whole_evaluation_is_timed_against_two_passes() -> None:
    line = str(bench_simulate.wholly("tiny", random_llama(), 64))
    assert line.startswith("tiny, 64 tokens: evaluation / 2 passes")
    assert "at most 1.2" in line


def test_bench_cache_keeps_a_row_for_every_target_and_every_cost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    assert bench_cache.main(["--tokens", "64", "--repeats", "1", "--json", str(file)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "quanto" not in line]
    assert lines[:2] == [hardware(), HEADER]
    kept = load(file)
    rows = [row for row in kept.rows if "quanto" not in row.name]
    assert [line[:58].rstrip() for line in lines[2:]] == [row.name for row in rows]
    assert [row.figures.get("at_most") for row in rows] == [1 / 4.5, 1.5, *6 * [None]]
    for name, own in (("eigen", rows[2:5]), ("predictive", rows[5:])):
        what = f"64 tokens, 2 layers, {name}: "
        assert [row.name for row in own] == [
            f"{what}memory / 16 bits",
            f"{what}static bytes / 16 bits",
            f"{what}step / dynamic cache",
        ]
        assert own[0].figures["ratio"] == pytest.approx(2 / 16, rel=0.03)
    assert kept.commands == ("python -m scripts.bench.cache --tokens 64 --repeats 1",)
    assert hardware() in kept.conditions.machine
    assert all(f"| {row.name} | " in results_text(kept) for row in rows)


@pytest.mark.parametrize("make", [eigen, predictive], ids=lambda make: make.__name__)
def test_made_up_quantizers_have_the_structure_of_their_recipe(make: Callable[..., dict[Site, Quantizer]]) -> None:
    made = make(layers=2, heads=2, head_dim=8)
    windows = torch.randint(64, (8, 48), generator=torch.Generator().manual_seed(0))
    fitted = calibrate(random_llama(), windows, recipe=make.__name__)
    assert list(made) == list(fitted)
    for site, own in made.items():
        assert kinds(own) == kinds(fitted[site])
        assert own.sources == fitted[site].sources
        assert own.decode_multiply_adds == fitted[site].decode_multiply_adds


def kinds(quantizer: Quantizer) -> list[str]:
    inner = quantizer.spec.inner
    return [quantizer.kind] if inner is None else [quantizer.kind, *kinds(vars(quantizer)["inner"])]


def test_the_plain_baseline_takes_the_nearest_level_and_keeps_the_tails() -> None:
    x = torch.linspace(-3, 3, 301)[None]
    found = bench_simulate.nearest_by_distance(x, n_levels=8)
    inner = x.abs() < 2.98
    assert torch.equal(found[~inner], x[~inner])
    assert (found - x).abs().max() <= 3 / 7 + 1e-3
    assert len(found[inner].unique()) == 8


def test_every_layer_of_the_benchmark_is_fitted_from_statistics_of_its_own() -> None:
    statistics = model_statistics(tokens=64, heads=1, layers=3)
    tables = [
        fit(statistics, load_recipe("kvquant-4"))[Site(layer, "key", "pre_rope")].tensors()["levels"]
        for layer in range(3)
    ]
    assert torch.equal(tables[0], tables[2])
    assert not torch.equal(tables[0], tables[1])


def test_squared_error_is_that_of_the_nearest_level() -> None:
    values = torch.tensor([[0.0], [0.9], [2.2]])
    assert bench_fit.squared_error(values, torch.tensor([2.0, 0.0, 1.0])) == pytest.approx((0.01 + 0.04) / 3)
