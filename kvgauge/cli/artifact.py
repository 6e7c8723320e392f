"""`artifact`: looks into artifact files, compares and converts them."""

import argparse
import json
import sys
from pathlib import Path

from artifacts.storage import check_suffix, naming, read, written_by_kvgauge
from kvgauge.cli.options.foreign import add_foreign_options, foreign_hints
from kvgauge.terminal.console import Parser, UsageError, run, say

FORMAT = "kvgauge.artifact"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("artifact", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `artifact`."""
    parser = Parser("artifact", __doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="sites, kinds, bits, ranges, codebooks, provenance")
    inspect.add_argument("file", type=Path, help="what `calibrate` wrote")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    validate = commands.add_parser("validate", help="check every rule of the format, and that it fits a model")
    validate.add_argument("file", type=Path, help="what `calibrate` wrote")
    validate.add_argument("--model", help="folder or hub id that it should fit")
    validate.add_argument("--device", default="cpu", help="where to run the model (default: cpu)")
    validate.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    diff = commands.add_parser("diff", help="how two artifacts differ; exit status 1 if they do")
    diff.add_argument("file", type=Path, help="one artifact")
    diff.add_argument("other", type=Path, help="the other")
    convert = commands.add_parser("convert", help="write as .safetensors or .pkl what kvgauge or another tool wrote")
    convert.add_argument("file", type=Path, help="artifact, KVQuant or LLaMA3-simquant pickle, msModelSlim folder")
    convert.add_argument("output", type=Path, help="name that ends in .safetensors or .pkl")
    add_foreign_options(convert)
    convert.add_argument("--force", action="store_true", help="replace an existing file")
    for command in (inspect, validate, diff, convert):
        command.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    commands = {"inspect": _inspect, "validate": _validate, "diff": _diff, "convert": _convert}
    return commands[args.command](args)


def _inspect(args: argparse.Namespace) -> int:
    from artifacts.inspect import report, table

    stored = read(args.file, FORMAT)
    with naming(args.file):
        found = report(stored)
    print(json.dumps(found, indent=2, allow_nan=False) if args.json else table(found))
    return 0


def _validate(args: argparse.Namespace) -> int:
    from artifacts.artifact import load

    artifact = load(args.file)
    if args.model:
        from kvgauge.loading.models import load_model
        from kvgauge.terminal.console import set_up_logging
        from simquant.policy.checks import check_coverage

        set_up_logging(verbose=False)
        loaded = load_model(argparse.Namespace(**vars(args), maxseqlen=None))
        layers = loaded.layers()
        artifact.check_model(loaded.fingerprint(layers))
        check_coverage(artifact, layers)
    fits = f", fits {args.model}" if args.model else ""
    print(f"{args.file}: valid, {len(artifact)} sites, digest {artifact.digest[:16]}{fits}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from artifacts.inspect import differences

    rows = differences(read(args.file, FORMAT), read(args.other, FORMAT))
    print("\n".join(rows) if rows else "same content")
    return 1 if rows else 0


def _convert(args: argparse.Namespace) -> int:
    from artifacts.artifact import save
    from artifacts.importers import Hints, open_foreign

    check_suffix(args.output)
    if args.output.exists() and not args.force:
        raise UsageError(f"{args.output} exists; --force replaces it")
    if args.output.exists() and not written_by_kvgauge(args.output):
        raise UsageError(f"{args.output} is not a file that kvgauge wrote; --force does not replace it")
    hints = foreign_hints(args)
    opened = open_foreign(args.file, hints)
    if not opened.notices and hints != Hints():
        raise UsageError(f"{args.file} is no file of another tool; drop the flags that describe one")
    for notice in opened.notices:
        say(f"note: {notice}")
    save(opened.artifact, args.output)
    print(f"{args.output}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
