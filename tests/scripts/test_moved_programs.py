"""The first names of programs, `python -m scripts.sweep` and the like, go on working from a checkout."""

import importlib.util
import runpy
import sys

import pytest

from scripts import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_a_first_name_runs_the_program_that_stands_elsewhere(name: str) -> None:
    found, moved = importlib.util.find_spec(name), importlib.util.find_spec(MOVED[name])
    assert found is not None
    assert moved is not None
    assert found.origin == moved.origin


def test_it_is_run_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts.sweep", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("scripts.sweep", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert "kvgauge sweep" in capsys.readouterr().out
