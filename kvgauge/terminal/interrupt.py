"""Ctrl-C between two items instead of inside one, and going on afterwards."""

import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from kvgauge.terminal.console import UsageError, say

if TYPE_CHECKING:
    from torch import Tensor

    from calib.statistics.model_statistics import ModelStatistics


def between_items(items: Iterable[Any]) -> Iterator[Any]:
    """The items; an interrupt is raised when the one at hand is finished, a second one at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        # The first Ctrl-C is only noted: statistics that hold half a window could neither be saved nor merged.
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("\nfinishing the current window; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        for item in items:
            yield item
            if asked:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def remaining_windows(windows: "Tensor", statistics: "ModelStatistics", source: Path) -> "Tensor":
    """The windows of this run that the statistics of an interrupted one do not hold yet.

    Raises
    ------
    UsageError
        If they hold windows that are not of this run.
    """
    from calib.text.sketches import window_digests

    digests, done = window_digests(windows), Counter(statistics.windows)
    foreign = set(done) - set(digests)
    if foreign:
        raise UsageError(
            f"{source}: {len(foreign)} of its {len(done)} windows are not of this run. --resume needs the same "
            "model, --dataset, --seqlen, --bos, --seed, --nsamples and --shard"
        )
    remain = []
    for digest in digests:  # a short text may give a window twice
        remain.append(not done[digest])
        done[digest] -= done[digest] > 0
    say(f"{len(statistics.windows)} windows are in {source}, {sum(remain)} remain")
    return windows[remain]
