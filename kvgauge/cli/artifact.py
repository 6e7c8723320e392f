"""Inspect, validate, compare and convert artifacts, the files of quantizers that `calibrate` writes."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from artifacts.storage import check_suffix, naming, read, written_by_kvgauge
from kvgauge.cli.options.common import parsed
from kvgauge.cli.options.foreign import add_foreign_options
from kvgauge.configuration.model import Dtype, ModelConfig
from kvgauge.configuration.recipe import RecipeConfig, foreign_hints
from kvgauge.terminal.console import Parser, UsageError, run, say

FORMAT = "kvgauge.artifact"


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """An artifact to look into."""

    file: Path
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """An artifact to check, and a model that it should fit."""

    file: Path
    model: ModelConfig


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """Two artifacts to compare."""

    file: Path
    other: Path


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A file to convert, and what a file of another tool does not say."""

    file: Path
    output: Path
    recipe: RecipeConfig
    force: bool = False


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("artifact", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `artifact`."""
    parser = Parser("artifact", __doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect", help="print bits, ranges and codebooks of every layer, and what the artifact was fitted on"
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help="artifact")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    validate = commands.add_parser(
        "validate", help="check a file against the format, and with --model that it fits a model"
    )
    validate.add_argument("file", type=Path, metavar="FILE", help="artifact")
    validate.add_argument("--model", metavar="MODEL", help="model that it should fit, as calibrate takes it")
    validate.add_argument("--device", help="device of the model (default: cpu)")
    validate.add_argument(
        "--dtype", choices=get_args(Dtype), help="dtype of the model's weights (default: auto, as stored)"
    )
    diff = commands.add_parser("diff", help="print the differences of two artifacts; exit status 1 if there are any")
    diff.add_argument("file", type=Path, metavar="FILE", help="an artifact")
    diff.add_argument("other", type=Path, metavar="OTHER", help="the artifact to compare it with")
    convert = commands.add_parser(
        "convert", help="convert an artifact or a file of another tool to .safetensors or .pkl"
    )
    convert.add_argument(
        "file", type=Path, metavar="FILE", help="artifact, KVQuant or LLaMA3-simquant pickle, or msModelSlim folder"
    )
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="file to write, .safetensors or .pkl")
    add_foreign_options(convert)
    convert.add_argument("--force", action="store_true", help="replace an existing file")
    for command in (inspect, validate, diff, convert):
        command.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    commands: dict[str, Callable[[], int]] = {
        "inspect": lambda: _inspect(parsed(InspectConfig, args)),
        "validate": lambda: _validate(parsed(ValidateConfig, args)),
        "diff": lambda: _diff(parsed(DiffConfig, args)),
        "convert": lambda: _convert(parsed(ConvertConfig, args)),
    }
    return commands[args.command]()


def _inspect(config: InspectConfig) -> int:
    from artifacts.inspect import report, table

    stored = read(config.file, FORMAT)
    with naming(config.file):
        found = report(stored)
    print(json.dumps(found, indent=2, allow_nan=False) if config.json else table(found))
    return 0


def _validate(config: ValidateConfig) -> int:
    from artifacts.artifact import load

    artifact = load(config.file)
    if config.model.model:
        from kvgauge.loading.models import load_model
        from kvgauge.terminal.console import set_up_logging
        from simquant.policy.checks import check_coverage

        set_up_logging(verbose=False)
        loaded = load_model(replace(config.model, device=config.model.device or "cpu"))
        layers = loaded.layers()
        artifact.check_model(loaded.fingerprint(layers))
        check_coverage(artifact, layers)
    fits = f", fits {config.model.model}" if config.model.model else ""
    print(f"{config.file}: valid, {len(artifact)} sites, digest {artifact.digest[:16]}{fits}")
    return 0


def _diff(config: DiffConfig) -> int:
    from artifacts.inspect import differences

    rows = differences(read(config.file, FORMAT), read(config.other, FORMAT))
    print("\n".join(rows) if rows else "same content")
    return 1 if rows else 0


def _convert(config: ConvertConfig) -> int:
    from artifacts.artifact import save
    from artifacts.importers import Hints, open_foreign

    check_suffix(config.output)
    if config.output.exists() and not config.force:
        raise UsageError(f"{config.output} exists; replace it with --force, or choose another name")
    if config.output.exists() and not written_by_kvgauge(config.output):
        raise UsageError(
            f"{config.output} was not written by kvgauge, so --force does not replace it; choose another name"
        )
    hints = foreign_hints(config.recipe)
    opened = open_foreign(config.file, hints)
    if not opened.notices and hints != Hints():
        raise UsageError(
            f"{config.file} is an artifact, which records its bits and ranges itself; remove the options that describe "
            "files of other tools"
        )
    for notice in opened.notices:
        say(f"note: {notice}")
    save(opened.artifact, config.output)
    print(f"{config.output}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
