"""Write the page of a report, report.html, again from its figures, report.json."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvgauge.cli.options.common import parsed
from kvgauge.terminal.console import Parser, UsageError, run, say

_EXPECTED = "expected the report.json that `evaluate --report FOLDER` writes"


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """The figures of a report."""

    file: Path


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("kvgauge report", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `kvgauge report`."""
    parser = Parser("kvgauge report", __doc__)
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="report.json that `evaluate --report` wrote; report.html goes beside it"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _main(argv: list[str]) -> int:
    config = parsed(PageConfig, parser().parse_args(argv))
    from kvgauge.report.page import write_report

    write_report(config.file.parent, _figures(config.file))
    say(f"{config.file.parent / 'report.html'}")
    return 0


def _figures(path: Path) -> dict[str, Any]:
    """The JSON of a report.

    Raises
    ------
    UsageError
        If the file is none, or of another version.
    """
    from kvgauge.report.gather import FORMAT, VERSION

    if path.is_dir():
        raise UsageError(f"{path} is a folder; type kvgauge report {path / 'report.json'}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; {_EXPECTED}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); {_EXPECTED}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"{path}: not a report; {_EXPECTED}")
    if found.get("version") != VERSION:
        raise UsageError(
            f"{path}: version {found.get('version')}; expected version {VERSION}. Run evaluate --report again"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
