"""Records of local tables: JSON lines, CSV, Parquet, Arrow, and folders saved by `datasets`."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from calib.text.conversations import FIELDS, Conversation, conversation, is_conversation
from calib.text.errors import CorpusError

Split = Literal["calibration", "evaluation"]

_PARTS: dict[Split, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation")}


Records = list[str] | list[Conversation]
"""Texts, or conversations."""


def jsonl_records(path: Path, text: str, field: str) -> Records:
    """Texts in a field of JSON lines, or conversations where the first line holds one; empty lines are skipped.

    Raises
    ------
    CorpusError
        For the first line that is no object, or holds neither the text nor the conversation that it should.
    """
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise CorpusError(f"{path}: expected a JSON object on every line; got empty lines; pass another file")
    records = [(where, _parsed(line, where)) for where, line in lines]
    first = records[0][1]
    name = next((name for name in (field, *FIELDS) if name in first), field)
    if is_conversation(first.get(name)):
        return [conversation(record.get(name), where) for where, record in records]
    return [_text(record, field, where) for where, record in records]


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: expected a JSON object; got {error}; correct or remove the line") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: expected a JSON object; got {line:.100}; correct or remove the line")
    return record


def _text(record: dict[str, Any], field: str, where: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        got = f"{type(text).__name__} {text!r:.60}" if field in record else f"{json.dumps(record):.100}"
        raise CorpusError(f"{where}: expected text in the field {field!r}; got {got}; name another one with --field")
    return text


def csv_records(path: Path, text: str, field: str, delimiter: str) -> list[str]:
    """Texts of a CSV column.

    Raises
    ------
    CorpusError
        If the header has no such column, or for the first incomplete line.
    """
    before = csv.field_size_limit(2**31 - 1)  # documents may exceed the default of 128 KiB
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = rows.fieldnames or []
        # DictReader files surplus columns under None and fills missing ones with None: both lines are incomplete.
        texts = [(rows.line_num, None if None in row else row[field]) for row in rows] if field in columns else []
    except csv.Error as error:
        where = f"{path}, after line {rows.line_num}"
        raise CorpusError(f"{where}: expected a table; got {error}; correct the line") from error
    finally:
        csv.field_size_limit(before)
    if field not in columns:
        raise _no_column(path, field, columns)
    if columns.count(field) > 1:
        raise CorpusError(f"{path}: expected one column {field!r}; got {columns.count(field)}; rename the others")
    short = next((number for number, text in texts if text is None), None)
    if short is not None:
        raise CorpusError(
            f"{path}, line {short}: expected {len(columns)} columns; got another number; quote texts with commas"
        )
    return [text for _, text in texts if text is not None]


def is_saved_dataset(path: Path) -> bool:
    """True for a folder saved by `datasets`."""
    return any(os.path.isfile(path / name) for name in ("state.json", "dataset_dict.json"))


def saved_dataset(path: Path, split: Split) -> Any:
    """Table of a folder saved by `datasets`, or its part for `split`.

    Raises
    ------
    CorpusError
        If there is no such part, or the folder cannot be read.
    """
    import datasets

    loaded = _table(path, datasets.load_from_disk)
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    part = next((part for part in _PARTS[split] if part in loaded), None)
    if part is None:
        raise CorpusError(
            f"{path}: expected a part {' or '.join(_PARTS[split])} for {split}; got {', '.join(loaded)}; name one, "
            f"such as {path / next(iter(loaded), 'train')}"
        )
    return loaded[part]


def parquet(path: Path) -> Any:
    """Table of a Parquet file."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        return _table(path, partial(datasets.Dataset.from_parquet, cache_dir=cache, keep_in_memory=True))


def arrow(path: Path) -> Any:
    """Table of an Arrow file."""
    import datasets

    return _table(path, datasets.Dataset.from_file)


def _table(path: Path, read: Callable[[str], Any]) -> Any:
    try:
        return read(str(path))
    except Exception as error:  # those of pyarrow and datasets have no common base
        cause = " ".join(str(error).split())[:200]
        raise CorpusError(f"{path}: expected a table that `datasets` can read; got {cause}; write it again") from error


def column_records(path: Path, table: Any, field: str) -> Records:
    """Texts of one column, or conversations where it holds these.

    Raises
    ------
    CorpusError
        If there is no such column, or for the first row with neither.
    """
    name = next((name for name in (field, *FIELDS) if name in table.column_names), None)
    if name is None:
        raise _no_column(path, field, table.column_names)
    texts: list[Any] = table[name][:]
    if texts and is_conversation(texts[0]):
        return [conversation(found, f"{path}, row {number}") for number, found in enumerate(texts, 1)]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise CorpusError(
                f"{path}, row {number}: expected text in the column {name!r}; got {type(text).__name__} {text!r:.60}; "
                "name another one with --field, or write token ids with numpy.save into a .npy file"
            )
    return texts


def _no_column(path: Path, field: str, columns: Any) -> CorpusError:
    return CorpusError(
        f"{path}: expected a column {field!r}; got {', '.join(map(repr, columns)) or 'none'}; name one with --field"
    )
