"""`make results`, `make results-check`, `make results-run`: figures of the documentation and the commands behind them.

`render` fills the blocks of README and docs/ and draws the plots, `check` tells what differs from docs/results/, `run`
runs the commands behind files again and tells which figures moved. Without names, `run` takes those that need minutes
only; what needs data looks in $KVGAUGE_SHARED, or in `../shared` beside the checkout.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from kvgauge.terminal.console import Parser, UsageError, run, say
from kvgauge.terminal.outputs import replace_text
from scripts.results.check import problems
from scripts.results.run import CHECKOUT
from scripts.results.schema import Results, load_all


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("results", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser("python -m scripts.results", __doc__)
    parser.add_argument("--checkout", type=Path, default=CHECKOUT, help="whose pages and results (default: this one)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render", help="fill the pages and draw the plots")
    commands.add_parser("check", help="say where a page and its results differ; write nothing")
    again = commands.add_parser("run", help="run commands again; say which figures moved")
    again.add_argument("names", nargs="*", metavar="NAME", help="files in docs/results (default: the quick ones)")
    again.add_argument(
        "--from",
        dest="written",
        type=Path,
        metavar="FILE",
        help="results.json of the command of the one NAME, which was run by hand; nothing is run",
    )
    again.add_argument("--write", action="store_true", help="store what was found, with today's conditions")
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.command == "render":
        return _render(args.checkout)
    if args.command == "check":
        found = problems(args.checkout)
        print("\n".join([*found, "run `make results`"]) if found else "every page holds what its results say")
        return bool(found)
    return _run(args)


def _render(checkout: Path) -> int:
    from scripts.results.blocks import filled_page, pages
    from scripts.results.plots import PLOTS, pareto_svg

    found = load_all(checkout / "docs" / "results")
    for page in pages(checkout):
        replace_text(page, filled_page(page.read_text(encoding="utf-8"), found))
    for file, name in PLOTS.items():
        (checkout / "docs" / file).write_bytes(pareto_svg(found[name]))
    return 0


def _run(args: argparse.Namespace) -> int:
    found = load_all(args.checkout / "docs" / "results")
    unknown = sorted(set(args.names) - set(found))
    if unknown:
        raise UsageError(f"there is no docs/results/{unknown[0]}.json; known are {', '.join(found)}")
    if args.written is not None and len(args.names) != 1:
        raise UsageError(f"--from: expected one NAME, whose command wrote the file; got {len(args.names)}")
    failed = False
    for name in args.names or found:
        lacking = "" if args.written else _lacking(found[name], bool(args.names))
        if lacking:
            print(f"skipped  {name}: {lacking}")
        else:
            failed |= _run_one(name, found[name], args)
    return int(failed)


def _run_one(name: str, results: Results, args: argparse.Namespace) -> bool:
    """Runs a file's commands; whether a figure moved."""
    from scripts.results.record import releases, remeasured
    from scripts.results.run import measured, moved, read

    started = time.monotonic()
    machine = {}
    if args.written is not None:
        figures, about = read(results, args.written)
        machine = {"machine": about["hardware"], "versions": releases(about["versions"])}
    else:
        figures = measured(results, _data_folder() if "shared" in results.needs else None)
    lines = list(moved(results, figures))
    state = "moved  " if lines else "ok     "
    print(f"{state}  {name}: {len(results.rows)} rows in {time.monotonic() - started:.0f} s", flush=True)
    print(*(f"  {line}" for line in lines), sep="\n", end="\n" if lines else "")
    if args.write:
        path = args.checkout / "docs" / "results" / f"{name}.json"
        replace_text(path, remeasured(results, figures, machine))
        say(f"{path}: written; `make results` puts it into the pages")
    return bool(lines)


def _lacking(results: Results, named: bool) -> str:
    """Reason for which commands are not run; empty if they are."""
    if "shared" in results.needs and _data_folder() is None:
        return "needs the data folder; set KVGAUGE_SHARED"
    others = [need for need in results.needs if need != "shared"]
    return "" if named or not others else f"needs {', '.join(others)}; name it to run it"


def _data_folder() -> Path | None:
    folder = Path(os.environ.get("KVGAUGE_SHARED") or CHECKOUT.parent / "shared") / "data"
    return folder.resolve() if folder.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
