"""`make claims`: are the figures of the README what its commands give?

Without a name, all claims are checked that need neither a download nor an idle machine, a GPU or hours; those that need
the data folder ($KVGAUGE_SHARED, or `../shared` beside the checkout) where it is. Named ones are checked whatever they
need.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvgauge.terminal.console import Parser, UsageError, run
from scripts.claims.file import CLAIMS, Claim, TableClaim, load_claims
from scripts.claims.readme import readme_problems
from scripts.claims.run import Finding, Runner
from scripts.claims.tables import Table

_CHECKOUT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("claims", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser("claims", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims to check (default: all that are quick)")
    parser.add_argument("--file", type=Path, default=CLAIMS, help="the claims (default: scripts/claims.yaml)")
    parser.add_argument("--readme", type=Path, default=_CHECKOUT / "README.md", help="(default: that of the checkout)")
    parser.add_argument("--list", action="store_true", help="print name, needs, figures and sentence of every claim")
    parser.add_argument(
        "--check-readme",
        action="store_true",
        help="run nothing; say which figures of the README have no claim or differ",
    )
    parser.add_argument("--print", action="store_true", help="print tables with what was found, for the README")
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    claims = load_claims(args.file)
    if args.check_readme:
        problems = readme_problems(args.readme.read_text(encoding="utf-8"), claims)
        print("\n".join(problems) or f"{args.readme.name}: every figure in a table has its claim")
        return bool(problems)
    unknown = set(args.names) - {claim.name for claim in claims}
    if unknown:
        raise UsageError(f"no claim is called {', '.join(sorted(unknown))}; see claims --list")
    chosen = [claim for claim in claims if not args.names or claim.name in args.names]
    if args.list:
        print("\n".join(_line(claim) for claim in chosen))
        return 0
    return _check(chosen, bool(args.names), args.print)


def _line(claim: Claim) -> str:
    return (
        f"{claim.name} [{', '.join(claim.needs) or 'nothing'}], {len(claim.cells())} to check: {claim.sentence.strip()}"
    )


def _check(claims: Sequence[Claim], named: bool, show: bool) -> int:
    """Checks claims one after another; the exit status."""
    data = _data_folder()
    runner, failed = Runner(data), 0
    for claim in claims:
        lacking = _lacking(claim, data, named)
        if lacking:
            print(f"skipped  {claim.name}: {lacking}")
            continue
        started = time.monotonic()
        findings = runner.check(claim)
        wrong = [finding for finding in findings if not finding.agrees]
        failed += bool(wrong)
        word = "FAILED " if wrong else "ok     "
        print(f"{word}  {claim.name}: {len(findings)} checked in {time.monotonic() - started:.0f} s", flush=True)
        if wrong:
            print(f"  {claim.sentence.strip()}", *(finding.describe() for finding in wrong), sep="\n    ")
        if show and isinstance(claim, TableClaim):
            print(_as_found(claim, findings).to_markdown())
    return bool(failed)


def _lacking(claim: Claim, data: Path | None, named: bool) -> str:
    """Why a claim is not checked; empty if it is."""
    if "shared" in claim.needs and data is None:
        return "needs the data folder; set KVGAUGE_SHARED"
    others = [need for need in claim.needs if need != "shared"]
    return "" if named or not others else f"needs {', '.join(others)}; name it to check it"


def _as_found(claim: TableClaim, findings: Sequence[Finding]) -> Table:
    """The table with what was found in place of what was claimed."""
    found = {finding.where: finding.found for finding in findings}
    rows = [
        [found.get(f"{row[0]}, {column}", text) for column, text in zip(claim.columns(), row, strict=True)]
        for row in claim.content.rows
    ]
    return Table(claim.content.heading, tuple(map(tuple, rows)))


def _data_folder() -> Path | None:
    folder = Path(os.environ.get("KVGAUGE_SHARED") or _CHECKOUT.parent / "shared") / "data"
    return folder.resolve() if folder.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
