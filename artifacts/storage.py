"""Bytes on disk: one JSON header and named arrays, as safetensors or as a pickle of builtin containers.

Both hold the same content and the same digest. The suffix decides which is written, the content which is read; reading
never runs code and needs no torch. Statistics are kept in the same container under another `format`.
"""

import hashlib
import io
import json
import pickle
import pickletools
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import ArtifactError, CorruptArtifactError, UnsupportedVersionError
from artifacts.whole_file import write_whole

Array = NDArray[Any]

FORMAT_VERSION = 1
"""Of a format that has not changed since there are files of it."""
SUFFIXES = (".safetensors", ".pkl")
_METADATA_KEY = "kvgauge"
_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("BININT", "BININT1", "BININT2", "LONG1"),
)
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a file holds.

    Parameters
    ----------
    format : str
        What the file is: `kvgauge.artifact`, `kvgauge.statistics` or `kvgauge.cache`.
    version : int
        Version of that format.
    header : Mapping[str, Any]
        JSON values.
    arrays : Mapping[str, Array]
        Arrays by name.
    """

    format: str
    header: Mapping[str, Any]
    arrays: Mapping[str, Array]
    version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """SHA-256 over format, header and every array's name, dtype, shape and bytes."""
        sha = hashlib.sha256(canonical_json({"format": self.format, "header": self.header}).encode())
        for name in sorted(self.arrays):
            array = self.arrays[name]
            sha.update(canonical_json([name, str(array.dtype), list(array.shape)]).encode())
            sha.update(np.asarray(array, order="C").data)
        return sha.hexdigest()


def canonical_json(value: object) -> str:
    """JSON text that is the same for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def check_suffix(path: Path) -> None:
    """The path ends in a suffix that can be written.

    Raises
    ------
    ArtifactError
        If it does not.
    """
    if path.suffix not in SUFFIXES:
        raise ArtifactError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}, got {path.suffix!r}")


def write(path: Path, stored: Stored) -> None:
    """Writes the file whole or not at all.

    Raises
    ------
    ArtifactError
        If the suffix is unknown.
    OSError
        If the folder takes no new file.
    """
    check_suffix(path)
    text = canonical_json(
        {"format": stored.format, "version": stored.version, "digest": stored.digest, "header": stored.header}
    )
    data = _to_safetensors(text, stored.arrays) if path.suffix == ".safetensors" else _to_pickle(text, stored.arrays)
    write_whole(path, data)


def written_by_kvgauge(path: Path) -> bool:
    """Whether a file has a kvgauge header, be it of another version or format."""
    try:
        text, _ = _parse(path, _read_bytes(path))
        return str(json.loads(text)["format"]).startswith("kvgauge.")
    except (ArtifactError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read(path: Path, expected_format: str, expected_version: int = FORMAT_VERSION) -> Stored:
    """Reads and verifies a file.

    Raises
    ------
    CorruptArtifactError
        If the file is missing, foreign, truncated or altered.
    UnsupportedVersionError
        If another format version wrote it.
    """
    text, arrays = _parse(path, _read_bytes(path))
    try:
        top = json.loads(text)
        version, digest = top["version"], top["digest"]
        stored = Stored(format=top["format"], header=top["header"], arrays=arrays, version=expected_version)
        canonical_json(top)  # refuses what JSON text can say and canonical JSON cannot: NaN and infinities
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifactError(
            f"{path}: the header is not the JSON object that kvgauge writes ({error})"
        ) from error
    if stored.format != expected_format:
        raise CorruptArtifactError(f"{path}: expected a file of format {expected_format}, got {stored.format!r:.60}")
    if type(version) is not int or version != expected_version:
        raise UnsupportedVersionError(
            f"{path}: {expected_format} of format version {version!r:.20}; this kvgauge reads version "
            f"{expected_version}. Install the kvgauge that wrote it, or write it anew."
        )
    foreign = sorted({str(array.dtype) for array in arrays.values()} - set(_DTYPES))
    if foreign:
        raise CorruptArtifactError(f"{path}: arrays must be of dtype {', '.join(_DTYPES)}; got {', '.join(foreign)}")
    if not isinstance(stored.header, dict) or stored.digest != digest:
        raise CorruptArtifactError(f"{path}: the content does not match its digest; the file was altered or damaged")
    return stored


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Refusals raised inside say which file they are about."""
    try:
        yield
    except ArtifactError as error:
        raise type(error)(f"{path}: {error}") from error


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        hint = f" Did you mean {path / inside[0]}?" if inside else ""
        raise CorruptArtifactError(f"{path}: expected a file, got a directory.{hint}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    if data.startswith(_LFS_POINTER):
        raise CorruptArtifactError(f"{path}: this is a git-lfs pointer, not the file itself. Run: git lfs pull")
    if not data:
        raise CorruptArtifactError(f"{path}: the file is empty")
    return data


def _parse(path: Path, data: bytes) -> tuple[str, dict[str, Array]]:
    if data[8:9] == b"{":  # asked first: the length before it may begin with any byte, that of a pickle included
        return _from_safetensors(path, data)
    if data[:1] == b"\x80":
        return _from_pickle(path, data)
    if data[:2] == b"PK":
        raise CorruptArtifactError(f"{path}: this is a zip archive such as torch.save writes, not a kvgauge file")
    raise CorruptArtifactError(f"{path}: neither a safetensors file nor a pickle (first bytes {data[:8]!r})")


def _to_safetensors(text: str, arrays: Mapping[str, Array]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.asarray(array, order="C") for name, array in arrays.items()}, {_METADATA_KEY: text})


def _from_safetensors(path: Path, data: bytes) -> tuple[str, dict[str, Array]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptArtifactError(f"{path}: not a whole safetensors file ({error})") from error
    text = (header.get("__metadata__") or {}).get(_METADATA_KEY)
    if text is None:
        raise CorruptArtifactError(
            f"{path}: a safetensors file without kvgauge metadata; model weights, perhaps. "
            "Expected what `calibrate` wrote"
        )
    return text, arrays


def _to_pickle(text: str, arrays: Mapping[str, Array]) -> bytes:
    rows = [
        (name, str(arrays[name].dtype), tuple(int(n) for n in arrays[name].shape), arrays[name].tobytes())
        for name in sorted(arrays)
    ]
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    pickler.fast = True  # no memo: equal content gives equal bytes, whichever objects happen to be shared
    pickler.dump({_METADATA_KEY: text, "arrays": rows})
    return buffer.getvalue()


class _BuiltinsOnly(pickle.Unpickler):
    """Builds builtin containers; every reference to a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise ArtifactError(f"it refers to {module}.{name}")


def _check_instructions(data: bytes) -> None:
    """The pickle uses only the instructions that `_to_pickle` writes.

    They make containers, texts, bytes and integers. Those that call or refer to code are missing, and so is the memo:
    with it a few bytes can claim gigabytes, or nest a list in itself.

    Raises
    ------
    ArtifactError
        At the first other instruction.
    ValueError
        If the bytes are no instructions at all, or go on after the end.
    """
    position = -1
    for instruction, _, at in pickletools.genops(data):
        position = at or 0
        if instruction.name not in _INSTRUCTIONS:
            raise ArtifactError(f"it uses the instruction {instruction.name}")
    if position != len(data) - 1:
        raise ValueError("bytes after the end")


def _from_pickle(path: Path, data: bytes) -> tuple[str, dict[str, Array]]:
    try:
        _check_instructions(data)
        content = _BuiltinsOnly(io.BytesIO(data)).load()
    except ArtifactError as error:
        raise CorruptArtifactError(
            f"{path}: {error}, which no kvgauge pickle does: it holds plain containers, and nothing in it is ever run. "
            "Pickles of other tools: artifact convert FILE q.safetensors."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptArtifactError(f"{path}: not a whole pickle ({type(error).__name__}: {error!s:.100})") from error
    try:
        rows, text = content["arrays"], content[_METADATA_KEY]
        if not isinstance(text, str) or not isinstance(rows, list):
            raise TypeError("header or arrays of another type")
        return text, {row[0]: _to_array(*row) for row in rows}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptArtifactError(f"{path}: a pickle, but not one that kvgauge wrote ({error!s:.100})") from error


def _to_array(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Array:
    if not isinstance(name, str) or dtype not in _DTYPES or not isinstance(data, bytes):
        raise ValueError(f"array {name!r:.60} of dtype {dtype!r:.20}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
