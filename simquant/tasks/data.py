"""Rows of task data, from a local file or from the hub."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simquant.tasks.errors import TaskError

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 5.0

Row = Mapping[str, Any]


def read_rows(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[Row]:
    """Objects of a `.jsonl` file.

    Parameters
    ----------
    path : Path
        File with one JSON object per line.
    fields : mapping from str to type
        Required fields and their types.

    Raises
    ------
    TaskError
        If the file is missing or empty, or a line is broken or lacks a field; the message has the line's number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: expected a .jsonl file in UTF-8; got {error}. Check the path.") from error
    if not text.strip():
        raise TaskError(f"{path}: expected one JSON object per line; got an empty file. Download it again.")
    return [_row(line, fields, f"{path}, line {number}") for number, line in enumerate(text.rstrip().split("\n"), 1)]


def data_file(data: Path | None, task: str) -> Path | None:
    """Local file of a task: the given file, or `TASK.jsonl` in the given folder; None without data.

    Raises
    ------
    TaskError
        If the folder has no such file.
    """
    if data is None or not data.is_dir():
        return data
    path = data / f"{task}.jsonl"
    if not path.is_file():
        raise TaskError(
            f"{task}: expected {path.name} in the folder of --task-data; {data} has none. Add it, or name the file."
        )
    return path


def hub_rows(repository: str, config: str | None, split: str, fields: Iterable[str], local: str) -> list[Row]:
    """Rows of a data set on the hub, or in its local cache.

    Parameters
    ----------
    repository, config, split : str
        Name of the data set, its configuration and split.
    fields : iterable of str
        Required columns.
    local : str
        Option that reads a local file instead, for the error.

    Raises
    ------
    TaskError
        If the data set cannot be loaded, or lacks a column.
    """
    try:
        with _offline_if_unreachable():
            import datasets

            loaded = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # datasets and the hub client raise from a dozen unrelated hierarchies
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise TaskError(
            f"{repository}: expected the data set on the hub or in its cache; got {cause}. Use local data: {local}"
        ) from error
    missing = sorted(set(fields) - set(loaded.column_names))
    if missing:
        raise TaskError(
            f"{repository}: expected the columns {', '.join(fields)}; got none named {', '.join(missing)}. Use local "
            f"data: {local}"
        )
    return list(loaded)


def _row(line: str, fields: Mapping[str, type | tuple[type, ...]], where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        got = error if line.strip() else "an empty line"
        raise TaskError(f"{where}: expected a JSON object; got {got}. Correct or remove the line.") from error
    if not isinstance(row, dict):
        raise TaskError(f"{where}: expected a JSON object; got {line:.60}. Correct or remove the line.")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            got = repr(row[name])[:60] if name in row else f"only {', '.join(map(str, row))[:60]}"
            raise TaskError(
                f"{where}: expected the field {name!r}, {_described(kind)}; got {got}. Correct or remove the line."
            )
    return row


def _described(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Context in offline mode if the hub does not answer."""
    # Without a network the hub client retries for long before it reads its local cache; offline it reads it at once.
    import datasets
    from huggingface_hub import get_session

    before = datasets.config.HF_HUB_OFFLINE
    if not before:
        try:
            get_session().head(datasets.config.HF_ENDPOINT, timeout=_TIMEOUT_SECONDS)
        except Exception as error:  # the client's exceptions changed their package twice
            logger.warning(
                "no answer from %s (%s): looking only into the local cache", datasets.config.HF_ENDPOINT, error
            )
            datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
