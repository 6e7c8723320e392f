"""Timing of benchmarks, and rows that compare a figure with a baseline and a target.

Benchmarks are run from the checkout as modules, on an idle machine: ``python -m scripts.bench.fit``.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def company_row(name: str, call: Callable[[], object], idle: float, repeats: int = 1) -> str:
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
    """Row of a report, below `HEADER`: both figures, their ratio, the target, and 'ok' or 'missed'.

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
