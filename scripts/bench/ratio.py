"""Timing of benchmarks, and rows that compare a figure with a baseline and a target.

Benchmarks are run from the checkout as modules, on an idle machine: ``python -m scripts.bench.fit``.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvgauge.running.machine import hardware
from scripts.results.record import now, record
from scripts.results.schema import Figures

HEADER = f"{'what':<58} {'ours':>12} {'baseline':>12} {'ratio':>9}  target"

COMPANY_LIMIT = 2.5
"""Limit of the slowdown beside a process that keeps a core busy."""

_BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
"""Program of the busy process, which ends when its parent does."""


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Minimum wall-clock seconds of `repeats` calls: disturbances only ever add time."""
    # The minimum, as in timeit: other processes, caches and clock changes can slow a call down, never speed it up.
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)


@contextmanager
def company() -> Iterator[None]:
    """Context with another process that keeps a core busy."""
    with subprocess.Popen([sys.executable, "-c", _BUSY]) as busy:
        try:
            yield
        finally:
            busy.kill()


@dataclass(frozen=True)
class Measured:
    """Figure against a baseline and a target; as text a row of a report, below `HEADER`.

    Parameters
    ----------
    name : str
        Name of the measurement.
    ours, baseline : float
        Figures in `unit`, lower is better.
    at_least : float or None
        Target for ``baseline / ours``, the speed-up.
    at_most : float or None
        Target for ``ours / baseline``, which is also the ratio shown without a target.
    unit : str
        Unit of both figures.

    Examples
    --------
    >>> print(Measured("fit", 0.5, 100.0, at_least=100))
    fit                                                               0.5 s        100 s   200.000  at least 100: ok
    >>> print(Measured("error", 3.0, 2.0, at_most=1.0, unit=""))
    error                                                               3            2     1.500  at most 1: missed
    """

    name: str
    ours: float
    baseline: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "s"

    def __post_init__(self) -> None:
        assert self.at_least is None or self.at_most is None, "a row has one target"

    @property
    def ratio(self) -> float:
        """Ours over the baseline, or the inverse with a target of the kind `at_least`."""
        return self.ours / self.baseline if self.at_least is None else self.baseline / self.ours

    @property
    def met(self) -> bool | None:
        """True if the target is met; None without a target."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return None if self.at_most is None else self.ratio <= self.at_most

    def figures(self) -> Figures:
        """Figures for a file of results."""
        found = {"ours": self.ours, "baseline": self.baseline, "unit": self.unit or None, "ratio": self.ratio}
        target = {"at_least": self.at_least, "at_most": self.at_most, "met": self.met}
        return {name: value for name, value in (found | target).items() if value is not None}

    def __str__(self) -> str:
        figures = (f"{x:.4g} {self.unit}".rstrip() for x in (self.ours, self.baseline))
        parts = [f"{self.name:<58}", *(f"{x:>12}" for x in figures), f"{self.ratio:>9.3f}", self._verdict()]
        return " ".join(parts)

    def _verdict(self) -> str:
        if self.met is None:
            return " none"
        target = f"at most {self.at_most:g}" if self.at_least is None else f"at least {self.at_least:g}"
        return f" {target}: {'ok' if self.met else 'missed'}"


def company_row(name: str, call: Callable[[], object], idle: float, repeats: int = 1) -> Measured:
    """Row of a report: time of a call beside a busy process, against its time on the idle machine.

    Parameters
    ----------
    name : str
        Name of the measurement.
    call : callable
        Call to measure again.
    idle : float
        Seconds of the call alone.
    repeats : int
        Number of calls, of which the quickest counts.
    """
    with company():
        ours = seconds(call, repeats)
    return Measured(f"{name}, in company / idle", ours, idle, at_most=COMPANY_LIMIT)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json FILE` to the options of a benchmark."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="adds the rows to this file of results, in place of older ones"
    )


def report(
    rows: Iterable[Measured], path: Path | None, program: str, argv: Sequence[str] | None, what: tuple[str, str]
) -> None:
    """Prints rows as they are measured, and adds them to a file of results if one is named.

    Parameters
    ----------
    rows : iterable of Measured
        Rows, measured one after another.
    path : Path or None
        File named by `--json`.
    program, argv
        Name of the benchmark and its options, those of this process if None.
    what : pair of str
        Model and text, for the conditions.
    """
    print(hardware(), HEADER, sep="\n")
    found = {}
    for measured in rows:
        print(measured, flush=True)
        found[measured.name] = measured.figures()
    if path is not None:
        record(path, "benchmark", f"Benchmark {program}", [as_typed(program, argv)], now(*what), found)


def as_typed(program: str, argv: Sequence[str] | None) -> str:
    """The command of a benchmark, without `--json` and its file.

    Examples
    --------
    >>> as_typed("fit", ["--tokens", "64", "--json", "out.json"])
    'python -m scripts.bench.fit --tokens 64'
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return shlex.join(["python", "-m", f"scripts.bench.{program}", *words])
