"""Log of finished windows, from which an interrupted evaluation resumes."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import InvalidValueError, KVGaugeError
from artifacts.storage import canonical_json
from artifacts.whole_file import write_whole

_FORMAT = "kvgauge.windows"
_VERSION = 2


class WindowLogError(KVGaugeError, ValueError):
    """Log of windows that cannot be read, or belongs to another evaluation."""


@dataclass(frozen=True)
class WindowLog:
    """JSON Lines file with a header of settings and a line for each finished batch of windows.

    A line is written when its batch is finished, so that a killed run loses only its current batch; an incomplete last
    line is cut off. A log serves one run at a time: lines carry the number of their batch, so that the lines of two
    concurrent runs are detected.

    Parameters
    ----------
    path : Path
        Path of the log; created by the first run.

    Examples
    --------
    >>> import tempfile
    >>> log = WindowLog(Path(tempfile.mkdtemp()) / "windows.jsonl")
    >>> log.start({"seqlen": 256})
    []
    >>> log.append(0, {"nats": 0.1})
    >>> log.start({"seqlen": 256})
    [{'nats': 0.1}]
    """

    path: Path

    def start(self, settings: Mapping[str, Any]) -> list[Any]:
        """Finished batches of earlier runs, in order; creates the log if there is none.

        Parameters
        ----------
        settings : Mapping[str, Any]
            Settings that the scores depend on, as JSON values.

        Raises
        ------
        WindowLogError
            If the file is not a log of windows, is damaged, was written by two runs at a time, or has other settings,
            which the message names.
        """
        if self.path.is_dir():
            raise WindowLogError(f"{self.path}: expected a file for the log; got a folder. Name a file in it.")
        if not self.path.exists() or not self.path.stat().st_size:
            self._create(settings)
            return []
        # The header was written atomically. Only the last line can be incomplete: the batch of a run that was killed.
        first, *lines = self.path.read_bytes().splitlines(keepends=True)
        self._check(first, settings)
        if lines and not _whole(lines[-1]):
            os.truncate(self.path, self.path.stat().st_size - len(lines.pop()))
        return [self._found(batch, line) for batch, line in enumerate(lines)]

    def append(self, batch: int, found: Any) -> None:
        """Adds the scores of a batch, as JSON values; batches are numbered from 0."""
        with self.path.open("ab", buffering=0) as file:
            file.write(f"{canonical_json({'batch': batch, 'found': found})}\n".encode())

    def _create(self, settings: Mapping[str, Any]) -> None:
        """Creates the log with its settings, in one atomic write."""
        header = canonical_json({"format": _FORMAT, "version": _VERSION, "settings": settings})
        write_whole(self.path, f"{header}\n".encode("ascii"))

    def _check(self, header: bytes, settings: Mapping[str, Any]) -> None:
        try:
            top = json.loads(header)
            if top["format"] != _FORMAT or top["version"] != _VERSION:
                raise InvalidValueError(f"format {top['format']!r:.40}, version {top['version']!r:.20}")
            held = dict(top["settings"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WindowLogError(
                f"{self.path}: expected a log of evaluated windows, version {_VERSION}; got another file "
                f"({error!s:.100}). Name a file that does not exist yet."
            ) from error
        rows = _differences(held, json.loads(canonical_json(settings)))
        if rows:
            raise WindowLogError(
                f"{self.path}: expected a log of this evaluation; got one of another:\n  "
                + "\n  ".join(rows)
                + "\nUse the settings of the log, or name another file."
            )

    def _found(self, batch: int, line: bytes) -> Any:
        who = f"{self.path}: line {batch + 2}"
        if not _whole(line):
            raise WindowLogError(
                f"{who}: expected a complete line; got a damaged one before others. Delete the file, or all lines from "
                "there on."
            )
        entry = json.loads(line)
        if not isinstance(entry, dict) or entry.keys() != {"batch", "found"} or entry["batch"] != batch:
            got = entry.get("batch") if isinstance(entry, dict) else entry
            raise WindowLogError(
                f"{who}: expected batch {batch}; got {got!r:.40}, as if two runs had written to the log. Delete the "
                "file, or all lines from there on."
            )
        return entry["found"]


def _whole(line: bytes) -> bool:
    """True if a line is complete."""
    if not line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    names = [name for name in sorted({*held, *asked}) if held.get(name) != asked.get(name)]
    return [f"{name}: the log has {held.get(name)!r:.120}, this run {asked.get(name)!r:.120}" for name in names]
