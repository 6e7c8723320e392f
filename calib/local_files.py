"""Local files as text or as token ids; each refusal says what stands in the file and what to do about it."""

import codecs
import difflib
import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from calib.corpus_errors import CorpusError
from calib.hub_datasets import KNOWN_DATASETS

_GIT_LFS = b"version https://git-lfs.github.com/spec/"


def check_file(path: Path) -> None:
    """Refuses what is not a file with content, before its format is looked at."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_GIT_LFS))
    except FileNotFoundError as error:
        close = difflib.get_close_matches(str(path), KNOWN_DATASETS, n=1)
        advice = f"did you mean {close[0]}?" if close else "check the path"
        raise CorpusError(f"{path}: expected {', '.join(KNOWN_DATASETS)} or a file; got neither; {advice}") from error
    except IsADirectoryError as error:
        raise CorpusError(f"{path}: expected a file; got a directory; name one file in it") from error
    except OSError as error:
        raise CorpusError(f"{path}: expected a readable file; got {error.strerror}; check the path") from error
    if not head:
        raise CorpusError(f"{path}: expected content; got a file of 0 bytes; was it downloaded completely?")
    if head == _GIT_LFS:
        raise CorpusError(f"{path}: expected data; got a git-lfs pointer to it; run `git lfs pull` first")


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file, as it is."""
    check_file(path)
    data = path.read_bytes()
    charset = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: expected UTF-8 text; got byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason}); convert it, e.g. with iconv -f {charset} -t utf-8"
        ) from error
    if "\0" in text:
        raise CorpusError(f"{path}: expected text; got a zero byte at offset {data.index(0)}; is it a binary file?")
    return text


def read_jsonl(path: Path, field: str) -> str:
    """The texts in one field of all lines, joined by blank lines."""
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = read_text(path).rstrip().split("\n")
    return "\n\n".join(_parse_line(line, field, f"{path}, line {number}") for number, line in enumerate(lines, 1))


def _parse_line(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        got = error if line.strip() else "an empty line"
        raise CorpusError(f"{where}: expected a JSON object; got {got}; mend or remove the line") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        got = f"{type(text).__name__} {text!r:.60}" if isinstance(record, dict) and field in record else f"{line:.100}"
        raise CorpusError(f"{where}: expected text in the field {field!r}; got {got}; name another one with --field")
    return text


def read_token_ids(path: Path) -> tuple[Int64[Tensor, "_"], ...]:
    """A stream, or the rows of a table, of token ids."""
    check_file(path)
    try:
        # Unlike np.load this holds the header against the size of the file, and never unpickles.
        stored = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise CorpusError(f"{path}: expected a .npy array of token ids; got {error}; write it with np.save") from error
    if stored.dtype.kind not in "iu" or stored.ndim not in (1, 2) or not stored.size:
        raise CorpusError(
            f"{path}: expected integer token ids, a 1-D stream or 2-D rows; got {stored.dtype} of shape "
            f"{stored.shape}; convert it, e.g. with tokens.astype('int64')"
        )
    ids = torch.from_numpy(np.array(stored, dtype=np.int64))
    if ids.min() < 0:  # also unsigned ids beyond int64, which wrap
        raise CorpusError(f"{path}: expected token ids from 0; got {int(ids.min())}; remove padding and label masks")
    return ids.unbind() if ids.ndim == 2 else (ids,)
