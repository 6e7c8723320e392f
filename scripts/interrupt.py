"""Ctrl-C between two items instead of inside one."""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from scripts.console import say


def between_items(items: Iterable[Any]) -> Iterator[Any]:
    """The items; an interrupt is raised when the one at hand is finished, a second one at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("\nfinishing the window at hand; Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        for item in items:
            yield item
            if asked:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
