"""Makes the page again from the JSON of a report: `kvgauge report FOLDER/report.json`."""

import argparse
import json
import sys
from pathlib import Path

from kvgauge.terminal.console import Parser, UsageError, run, say


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("kvgauge report", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The one argument."""
    parser = Parser("kvgauge report", __doc__)
    parser.add_argument("json", type=Path, metavar="FILE", help="report.json; report.html is written beside it")
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from kvgauge.report.gather import FORMAT, VERSION
    from kvgauge.report.page import write_report

    found = json.loads(args.json.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise UsageError(f"{args.json}: report.json of `evaluate --report`, version {VERSION}, was expected")
    write_report(args.json.parent, found)
    say(f"{args.json.parent / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
