"""What the programs tell while they run, where no terminal shows a bar."""

from threading import Event, Semaphore

import pytest

from kvgauge.terminal.console import bar


class Ticks:
    """Half minutes that pass when a test says so."""

    def __init__(self) -> None:
        self._passed, self._waited_for = Semaphore(0), Event()

    def __call__(self, finished: Event) -> bool:
        self._waited_for.set()
        while not finished.is_set():
            if self._passed.acquire(timeout=0.001):
                return False
        return True

    def pass_one(self) -> None:
        """Lets one pass, and waits until what follows from it has happened."""
        self._waited_for.wait()
        self._waited_for.clear()
        self._passed.release()
        self._waited_for.wait()


@pytest.mark.parametrize(("items", "line"), [(range(4), "counting: 2 of 4 after"), (iter("abcd"), "counting: 2 done")])
def test_without_a_terminal_a_line_tells_how_far_it_has_come(
    items: range, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was said for minutes where standard error went to a file; within a long item, too."""
    ticks = Ticks()
    for count, _ in enumerate(bar(items, "counting", pause=ticks)):
        assert capsys.readouterr().err == ""
        if count == 2:
            ticks.pass_one()
            assert capsys.readouterr().err.startswith(line)


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_an_error_ends_the_telling() -> None:
    finished: list[Event] = []

    def pause(event: Event) -> bool:
        finished.append(event)
        return event.wait()

    def failing() -> None:
        for _ in bar(range(3), "counting", pause=pause):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert all(event.is_set() for event in finished)
