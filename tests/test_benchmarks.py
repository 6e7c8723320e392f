"""The benchmark programs run on tiny sizes, and their rows tell met targets from missed ones; no time is asserted."""

import time

import pytest
import torch

from artifacts.sites import Site
from calib import fit, load_recipe, shipped_recipes
from scripts import bench_calibrate, bench_fit, bench_simulate
from scripts.benchmark import HEADER, hardware, row, seconds
from scripts.synthetic import model_statistics


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
    line = row("fit", 0.5, 2.0, **target)
    assert line.split()[:6] == ["fit", "0.5", "s", "2", "s", ratio]
    assert line.endswith(verdict)
    assert line.index(verdict) == HEADER.index("target")


def test_the_machine_is_named() -> None:
    assert f"torch {torch.__version__}" in hardware()


def test_the_least_of_the_repeats_counts() -> None:
    naps = iter([0.05, 0.0, 0.05])
    assert seconds(lambda: time.sleep(next(naps)), repeats=3) < 0.04


def test_bench_fit_prints_a_row_for_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_fit.main(["--tokens", "64", "--heads", "1", "--layers", "3", "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [hardware(), HEADER]
    assert [line.rsplit(":", 1)[0].rsplit("  ", 1)[1] for line in lines[2:]] == [
        "at least 100",
        "at least 30",
        "at most 1",
        "at most 1",
        "at most 1",
    ]
    assert lines[5].startswith("6 sites of 128 channels, recipe default")
    assert lines[6].startswith("6 sites of 128 channels, recipe eigen")


def test_bench_calibrate_prints_a_row_for_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_calibrate.main(["--tokens", "16", "--heads", "1", "--windows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [hardware(), HEADER]
    assert [line[:25] for line in lines[2:]] == [
        "1 windows, basic / bare  ",
        "1 windows, full / bare   ",
        "peak memory, 4 / 1 window",
    ]


def test_bench_simulate_prints_a_row_for_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_simulate.main(["--tokens", "64", "--heads", "1", "--windows", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [hardware(), HEADER]
    assert [line.rsplit("  ", 1)[1].partition(":")[0] for line in lines[2:]] == [
        "at most 1",
        "none",
        *["at most 1"] * sum(not load_recipe(name).needs_full for name in shipped_recipes()),
        "at most 1.3",
        "at most 1.3",
    ]


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
        fit(statistics, load_recipe("default"))[Site(layer, "key", "pre_rope")].tensors()["levels"]
        for layer in range(3)
    ]
    assert torch.equal(tables[0], tables[2])
    assert not torch.equal(tables[0], tables[1])


def test_squared_error_is_that_of_the_nearest_level() -> None:
    values = torch.tensor([[0.0], [0.9], [2.2]])
    assert bench_fit.squared_error(values, torch.tensor([2.0, 0.0, 1.0])) == pytest.approx((0.01 + 0.04) / 3)
