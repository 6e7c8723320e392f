"""Local files as text or token ids; errors name the format found and the way to convert it."""

import difflib
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from calib.text.bare_ids import read_bare_ids
from calib.text.errors import CorpusError
from calib.text.hub_datasets import KNOWN_DATASETS
from calib.text.padding import PaddingIds, without_padding
from calib.text.records import (
    Records,
    Split,
    arrow,
    column_records,
    csv_records,
    is_saved_dataset,
    jsonl_records,
    parquet,
    saved_dataset,
)

GZIP = b"\x1f\x8b"

PARQUET = b"PAR1"

ARROW = (b"\xff\xff\xff\xff", b"ARROW1")

NUMPY = b"\x93NUMPY"

BARE_IDS = ".bin"

_UNPACK = "unpack it, and name one text file in it"

_IDS = "write its token ids with numpy.save into a .npy file, or its text into a .txt or .jsonl file"

_AS_TEXT = "export it as plain text first"

_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"BZh9", "a bzip2 file", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", _UNPACK),
    *((b"\x80" + bytes([version]), "a pickle", _IDS) for version in range(2, 6)),
    (NUMPY, "a numpy array", "give it the suffix .npy"),
    (b"\x89HDF", "an HDF5 file", _IDS),
    (b"GGUF", "a GGUF file of weights", "name a text"),
    (b"SQLite format 3\0", "an SQLite database", _AS_TEXT),
    (b"%PDF-", "a PDF file", "extract its text first, e.g. with pdftotext"),
    (b"{\\rtf", "an RTF document", _AS_TEXT),
    (b"\xd0\xcf\x11\xe0", "an old Office document", _AS_TEXT),
    (b"\x89PNG", "a picture", "name a text"),
    (b"\xff\xd8\xff", "a picture", "name a text"),
    (b"GIF89a", "a picture", "name a text"),
    (b"\x7fELF", "a program", "name a text"),
)
"""First bytes of formats without plain text, their name, and advice."""

_SUFFIXES = {
    **dict.fromkeys((".npz", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".hdf5", ".idx"), _IDS),
    ".bin": "unpack it: bare token ids are read as they are",
    ".safetensors": "these are weights: name a text",
    **dict.fromkeys((".docx", ".xlsx", ".odt", ".epub"), _AS_TEXT),
}
"""Advice by suffix, for files of these formats."""

_CONTROL_SHARE = 0.01
"""Fraction of control characters that makes bytes binary: text in any encoding has hardly any, binary data 10 %."""

_GIT_LFS = b"version https://git-lfs.github.com/spec/"

_FIRST_BYTES = 512


def check_not_binary(path: Path, first_bytes: bytes) -> None:
    """Raises if the first bytes are those of a format without plain text.

    Raises
    ------
    CorpusError
        With the format and advice.
    """
    suffix = _inner_suffix(path)
    if first_bytes[257:262] == b"ustar":
        raise CorpusError(f"{path}: expected text; got a tar archive; {_UNPACK}")
    for beginning, what, advice in _BEGINNINGS:
        if first_bytes.startswith(beginning):
            raise CorpusError(f"{path}: expected text; got {what}; {_SUFFIXES.get(suffix, advice)}")


def undecodable(path: Path, data: bytes, error: UnicodeDecodeError) -> CorpusError:
    """Error for bytes that are not UTF-8: binary data, or text in another encoding."""
    where = f"got byte 0x{data[error.start]:02x} at offset {error.start}"
    # UTF-16 has zero bytes, as binary data does, but starts with a byte order mark.
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    control = sum(data.count(byte) for byte in range(32) if byte not in b"\t\n\r\f\x1b")
    binary = b"\0" in data or control > _CONTROL_SHARE * len(data) or _inner_suffix(path) in _SUFFIXES
    if binary and not is_utf16:
        return CorpusError(f"{path}: expected text; {where}, in binary data; {_binary_advice(path)}")
    charset = "utf-16" if is_utf16 else "latin1"
    return CorpusError(
        f"{path}: expected UTF-8 text; {where} ({error.reason}); convert it, e.g. with iconv -f {charset} -t utf-8"
    )


def zero_byte(path: Path, offset: int) -> CorpusError:
    """Error for a zero byte, which is valid UTF-8 but does not occur in text."""
    return CorpusError(
        f"{path}: expected text; got a zero byte at offset {offset}; is it a binary file? {_binary_advice(path)}"
    )


def _binary_advice(path: Path) -> str:
    return _SUFFIXES.get(_inner_suffix(path), "name a text, or token ids as .npy")


def _inner_suffix(path: Path) -> str:
    """Suffix in lower case, without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def check_file(path: Path) -> None:
    """Raises for anything but a non-empty file, and for formats of neither text nor token ids."""
    if is_saved_dataset(path):
        return
    try:
        with path.open("rb") as file:
            first_bytes = file.read(_FIRST_BYTES)
    except FileNotFoundError as error:
        close = difflib.get_close_matches(str(path), KNOWN_DATASETS, n=1)
        advice = f"did you mean {close[0]}?" if close else "check the path"
        raise CorpusError(f"{path}: expected {', '.join(KNOWN_DATASETS)} or a file; got neither; {advice}") from error
    except IsADirectoryError as error:
        raise CorpusError(f"{path}: expected a file; got a directory; name one file in it") from error
    except OSError as error:
        raise CorpusError(f"{path}: expected a readable file; got {error.strerror}; check the path") from error
    if not first_bytes:
        raise CorpusError(f"{path}: expected content; got a file of 0 bytes; was it downloaded completely?")
    if first_bytes.startswith(_GIT_LFS):
        raise CorpusError(f"{path}: expected data; got a git-lfs pointer to it; run `git lfs pull` first")
    if not is_token_ids(path):
        check_not_binary(path, first_bytes)


def is_token_ids(path: Path) -> bool:
    """True for `.bin` and `.npy` files, these by their first bytes as well."""
    if path.suffix.lower() in (BARE_IDS, ".npy"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(NUMPY)) == NUMPY
    except OSError:
        return False


def read_local_records(path: Path, field: str, split: Split) -> Records:
    """Records of a file, or of a folder saved by `datasets`; plain text is one record.

    Raises
    ------
    CorpusError
        If it has no text, or none in `field`.
    """
    check_file(path)
    if path.is_dir():
        return column_records(path, saved_dataset(path, split), field)
    data, suffix = _content(path)
    if suffix == ".parquet" or (data.startswith(PARQUET) and data.endswith(PARQUET)):
        return column_records(path, parquet(path), field)
    if suffix == ".arrow" or data.startswith(ARROW):
        return column_records(path, arrow(path), field)
    text = _decoded(path, data)
    match suffix:
        case ".jsonl" | ".ndjson" | ".jsonlines":
            return jsonl_records(path, text, field)
        case ".csv" | ".tsv":
            return csv_records(path, text, field, "\t" if suffix == ".tsv" else ",")
    _check_markup(path, text, suffix)
    return [text]


def _content(path: Path) -> tuple[bytes, str]:
    """Decompressed content of a file, and the lower-case suffix of its format."""
    data, name = path.read_bytes(), path.name.lower()
    if data.startswith(GZIP):
        try:
            data, name = gzip.decompress(data), name.removesuffix(".gz")
        except (OSError, EOFError, zlib.error) as error:
            raise CorpusError(f"{path}: expected a whole .gz file; got {error}; download it again") from error
        check_not_binary(path, data[:_FIRST_BYTES])
    return data, Path(name).suffix


def _decoded(path: Path, data: bytes) -> str:
    """Decoded UTF-8 text, without a byte order mark and with Unix line ends."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise undecodable(path, data, error) from error
    if "\0" in text:
        raise zero_byte(path, data.index(0))
    return text.replace("\r\n", "\n")


def _check_markup(path: Path, text: str, suffix: str) -> None:
    """Raises for JSON and HTML, whose markup would count as text.

    Raises
    ------
    CorpusError
        With the format and advice.
    """
    first = text.lstrip()[:200].lower()
    if suffix in (".html", ".htm", ".xhtml") or first.startswith(("<!doctype html", "<html")):
        raise CorpusError(f"{path}: expected text; got an HTML page; extract its text first, e.g. with lynx -dump")
    records = _is_record(next((line for line in text.split("\n") if line.strip()), ""))
    if suffix == ".json":
        several = records and "\n" in text.strip()
        advice = "rename it to .jsonl" if several else "write one object per line into a .jsonl file"
        raise CorpusError(f"{path}: expected text; got a .json file; {advice}")
    if records:
        raise CorpusError(f"{path}: expected text; got lines of JSON objects; rename it to .jsonl")


def _is_record(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_token_ids(path: Path, padding: PaddingIds, vocab_size: int | None) -> tuple[Int64[Tensor, "_"], ...]:
    """Token ids of a `.npy` or `.bin` file: a stream, or rows without padding."""
    check_file(path)
    if path.suffix.lower() == BARE_IDS:
        return (read_bare_ids(path, vocab_size),)
    try:
        # Unlike np.load this compares the header with the size of the file, and never unpickles.
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
    return without_padding(ids, padding, path.name) if ids.ndim == 2 else (ids,)
