"""What the benchmark programs share: a line about the machine, a clock, and rows that say whether a target is met.

They are run from the checkout as modules, on an idle machine: ``python -m scripts.bench.fit``.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HEADER = f"{'what':<58} {'ours':>12} {'baseline':>12} {'ratio':>9}  target"

COMPANY_LIMIT = 2.5
"""How many times as long work may take beside a process that keeps a core busy."""

_BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
"""Ends by itself where this process is killed."""


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Least wall-clock seconds of `repeats` calls: what disturbs a measurement only ever adds to it."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)


@contextmanager
def company() -> Iterator[None]:
    """One other process that keeps a core busy as long as the block runs."""
    with subprocess.Popen([sys.executable, "-c", _BUSY]) as busy:
        try:
            yield
        finally:
            busy.kill()


def company_row(name: str, call: Callable[[], object], idle: float, repeats: int = 1) -> str:
    """One line of a report: what a call takes beside a busy process, against what it took on the idle machine.

    Parameters
    ----------
    name : str
        What was measured.
    call : callable
        What is done again.
    idle : float
        Seconds that it took alone.
    repeats : int
        Calls of which the quickest counts.
    """
    with company():
        ours = seconds(call, repeats)
    return row(f"{name}, in company / idle", ours, idle, at_most=COMPANY_LIMIT)


def row(
    name: str,
    ours: float,
    baseline: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "s",
) -> str:
    """One line of a report, below `HEADER`: both figures, their ratio, the target, and whether it is met.

    Parameters
    ----------
    name : str
        What was measured.
    ours, baseline : float
        Both in `unit`, less being better.
    at_least : float or None
        Target for ``baseline / ours``: how many times as fast.
    at_most : float or None
        Target for ``ours / baseline``: what share of the baseline. Without a target that is the ratio shown.
    unit : str
        Printed behind both figures.

    Examples
    --------
    >>> print(row("fit", 0.5, 100.0, at_least=100))
    fit                                                               0.5 s        100 s   200.000  at least 100: ok
    >>> print(row("error", 3.0, 2.0, at_most=1.0, unit=""))
    error                                                               3            2     1.500  at most 1: missed
    """
    assert at_least is None or at_most is None, "a row has one target"
    ratio = ours / baseline if at_least is None else baseline / ours
    figures = (f"{x:.4g} {unit}".rstrip() for x in (ours, baseline))
    return " ".join(
        [f"{name:<58}", *(f"{x:>12}" for x in figures), f"{ratio:>9.3f}", _verdict(ratio, at_least, at_most)]
    )


def _verdict(ratio: float, at_least: float | None, at_most: float | None) -> str:
    if at_least is not None:
        return f" at least {at_least:g}: {'ok' if ratio >= at_least else 'missed'}"
    if at_most is not None:
        return f" at most {at_most:g}: {'ok' if ratio <= at_most else 'missed'}"
    return " none"
