"""Exit statuses, error messages, progress and logging of all programs."""

import argparse
import contextlib
import importlib.util
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

from artifacts.errors import KVGaugeError

FAILURE, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def _half_minute(finished: Event) -> bool:
    return finished.wait(30)


class UsageError(KVGaugeError):
    """The command line asks for something that cannot be."""


class Parser(argparse.ArgumentParser):
    """Takes options in full only, and answers a wrong one in two lines."""

    def __init__(self, prog: str, description: str | None = None, **options: Any) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exits with the status of wrong usage."""
        self.exit(WRONG_USAGE, f"{self.prog}: {message}\nSee {self.prog} --help\n")


def run(program: str, main: Callable[[list[str]], int], argv: list[str] | None) -> int:
    """Calls a program and turns what it raises into one message on standard error and an exit status."""
    arguments = [dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        return main(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone; nothing more to flush to it
        return FAILURE
    except KeyboardInterrupt as error:
        say(f"{program}: interrupted. {error}")
        return INTERRUPTED
    except Exception as error:
        # Looked for by hand: the error may be older than the parsed options.
        if "--debug" in arguments:
            traceback.print_exc()
        say(f"{program}: {_message(error).removeprefix(f'{program}: ')}")
        return WRONG_USAGE if isinstance(error, UsageError) else FAILURE


def dashes(word: str) -> str:
    """An option as the ancestors spell it, with dashes: `--quantizer_path=q` becomes `--quantizer-path=q`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def say(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr)


def bar(items: Iterable[Any], what: str, *, pause: Callable[[Event], bool] = _half_minute) -> Iterator[Any]:
    """The items, with a progress bar on a terminal, and elsewhere with a line every half minute.

    `pause` returns false when it is time for a line, and true when the items are finished.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, file=sys.stderr)
        return
    # A thread tells the progress, because one item, a window of a large model, may take longer than half a minute.
    progress, finished = Progress(what, len(items) if isinstance(items, Sized) else None), Event()
    teller = Thread(target=_tell, args=(progress, finished, pause), daemon=True)
    teller.start()
    try:
        for item in items:
            yield item
            progress.done += 1
    finally:
        finished.set()
        teller.join()


@dataclass
class Progress:
    """Progress of a loop.

    Parameters
    ----------
    what : str
        What is done.
    total : int or None
        Of how many; None where that is not known.
    clock : callable
        Seconds, from any start.

    Examples
    --------
    >>> seconds = iter([0.0, 90.0])
    >>> progress = Progress("evaluating", 16, clock=lambda: next(seconds))
    >>> progress.done = 4
    >>> progress.line()
    'evaluating: 4 of 16 after 1 min 30 s, about 4 min 30 s still'
    """

    what: str
    total: int | None
    clock: Callable[[], float] = time.monotonic
    done: int = 0

    def __post_init__(self) -> None:
        self._start = self.clock()

    def line(self) -> str:
        """A line for people, as of now."""
        seconds = self.clock() - self._start
        count = f"{self.done} of {self.total}" if self.total is not None else f"{self.done} done"
        left = (
            f", about {duration(seconds * (self.total - self.done) / self.done)} still"
            if self.total is not None and self.done
            else ""
        )
        return f"{self.what}: {count} after {duration(seconds)}{left}"


def duration(seconds: float) -> str:
    """A time for people.

    Examples
    --------
    >>> duration(7), duration(61), duration(7265)
    ('7 s', '1 min 1 s', '2 h 1 min')
    """
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _tell(progress: Progress, finished: Event, pause: Callable[[Event], bool]) -> None:
    while not pause(finished):
        say(progress.line())


def set_up_logging(verbose: bool) -> None:
    """Warnings, or with `verbose` what happens, on standard error."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not verbose and importlib.util.find_spec("transformers"):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with contextlib.suppress(ImportError):
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()


def artifacts_under_runs() -> list[Path]:
    """Artifacts that earlier calibrations left in `runs/`, newest first."""
    found = [path for suffix in ("safetensors", "pkl") for path in Path("runs").glob(f"*/*.{suffix}")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def listing_of_runs() -> str:
    """A sentence that names them."""
    found = artifacts_under_runs()
    if not found:
        return "There are none under runs/; make one with: calibrate MODEL --nuq --quantizer-path q.safetensors"
    return "Artifacts under runs/:\n" + "\n".join(f"  {path}" for path in found[:20])


def _message(error: Exception) -> str:
    text = str(error) or type(error).__name__
    known = isinstance(error, KVGaugeError | ValueError | OSError | MemoryError)
    return text if known else f"{type(error).__name__}: {text}"
