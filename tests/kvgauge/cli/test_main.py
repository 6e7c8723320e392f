"""The command `kvgauge`: all programs under one name, and the options of each in its configuration."""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from artifacts.manifest import tool_version
from kvgauge.cli.ablate import AblateConfig
from kvgauge.cli.compare import CompareConfig
from kvgauge.cli.demo import DemoConfig
from kvgauge.cli.main import PROGRAMS, main
from kvgauge.cli.report import PageConfig
from kvgauge.cli.sweep import SweepConfig
from kvgauge.configuration.calibrate import CalibrateConfig
from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.fields import filled, values_of
from kvgauge.sweeping.settings import Settings

Capture = pytest.CaptureFixture[str]


def test_the_help_lists_all_programs(capsys: Capture) -> None:
    listed = {path.stem for path in (Path(__file__).parents[3] / "kvgauge" / "cli").glob("*.py")}
    assert set(PROGRAMS) == listed - {"__init__", "main"}
    for words in (["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in PROGRAMS)
    assert main([]) == 2
    assert capsys.readouterr().out == shown


def test_the_version_is_that_of_the_files(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvgauge {tool_version()}\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [("calibrat", "did you mean calibrate?"), ("evalute", "did you mean evaluate?"), ("xyz", "expected one of calib")],
)
def test_an_unknown_word_is_answered_with_the_nearest_program(word: str, message: str, capsys: Capture) -> None:
    assert main([word]) == 2
    told = capsys.readouterr().err
    assert f"kvgauge: unknown command '{word}'" in told
    assert message in told
    assert told.endswith("See kvgauge --help\n")


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_tells_its_options(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ")
    assert "--debug" in shown


def test_a_program_answers_with_its_own_exit_status(capsys: Capture, tmp_path: Path) -> None:
    assert main(["artifact", "inspect", str(tmp_path / "gone.safetensors")]) == 1
    assert main(["report", str(tmp_path / "gone.json")]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--no-such-option"])
    assert ended.value.code == 2
    assert "See evaluate --help" in capsys.readouterr().err


def test_the_package_runs_as_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "kvgauge", "--version"], capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stdout == f"kvgauge {tool_version()}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; expected the report.json that `evaluate --report FOLDER` writes"),
        ("{", "not JSON (Expecting property name"),
        ("[]", "not a report; expected the report.json"),
        ('{"format": "kvgauge.report", "version": 1}', "version 1; expected version 2. Run evaluate --report again"),
    ],
)
def test_a_file_that_is_no_report_is_named(content: str | None, message: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvgauge report: {path}: {message}")


def test_a_folder_is_answered_with_the_file_to_type(tmp_path: Path, capsys: Capture) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"kvgauge report: {tmp_path} is a folder; type kvgauge report {tmp_path / 'report.json'}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 2
    assert "the following arguments are required: FILE" in capsys.readouterr().err


# --- configurations

_WITHOUT_FIELD = {"help", "debug", "calibrate", "no_flash_attn"}
"""Help, tracebacks, and what the ancestors' commands say needlessly."""


def names(kind: type) -> Iterator[str]:
    """Fields, with those of the configurations inside."""
    assert is_dataclass(kind)
    for field in fields(kind):
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from names(field.type)
        else:
            yield field.name


def options(name: str) -> set[str]:
    """Names of a program's visible options, as its parser stores them."""
    program: argparse.ArgumentParser = importlib.import_module(f"kvgauge.cli.{name}").parser()
    shown = {action.dest for action in program._actions if action.help != argparse.SUPPRESS}
    return shown - _WITHOUT_FIELD


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("calibrate", CalibrateConfig),
        ("evaluate", EvaluateConfig),
        ("sweep", SweepConfig),
        ("demo", DemoConfig),
        ("report", PageConfig),
    ],
)
def test_every_option_has_its_field_and_every_field_its_option(name: str, kind: type) -> None:
    unused = {"nf"} if name == "calibrate" else set()
    assert options(name) == set(names(kind)) - unused


@pytest.mark.parametrize(("name", "kind"), [("compare", CompareConfig), ("ablate", AblateConfig)])
def test_options_of_programs_with_settings_have_their_fields(name: str, kind: type) -> None:
    assert options(name) <= {*names(kind), *Settings.model_fields}


def test_what_is_not_given_is_the_default() -> None:
    config = filled(EvaluateConfig, {"device": None, "dtype": None, "batch_size": 4, "delta": 3, "other": 1})
    assert (config.model.device, config.model.dtype) == (None, "auto")
    assert config.scoring.batch_size == 4
    assert config.protocol.eviction.given == {"delta": 3}
    assert values_of(config)["delta"] == 3
    assert filled(EvaluateConfig, values_of(config)) == config
