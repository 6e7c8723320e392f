"""File container: a JSON header and named arrays, as safetensors or as a pickle of builtin containers.

Both have the same content and digest. Writing chooses by suffix, reading by content; reading never executes code and
needs no torch. Statistics and saved caches use the same container under another `format`.
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

from artifacts.errors import ArtifactError, CorruptArtifactError, InvalidValueError, UnsupportedVersionError
from artifacts.whole_file import write_whole

Array = NDArray[Any]

FORMAT_VERSION = 1
"""Version of a format that has not changed since its first files."""
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
    """Content of a file.

    Parameters
    ----------
    format : str
        Type of the content: `kvgauge.artifact`, `kvgauge.statistics` or `kvgauge.cache`.
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
        # Each array is preceded by its name, dtype and shape, so that no two contents give the same bytes to hash.
        sha = hashlib.sha256(canonical_json({"format": self.format, "header": self.header}).encode())
        for name in sorted(self.arrays):
            array = self.arrays[name]
            sha.update(canonical_json([name, str(array.dtype), list(array.shape)]).encode())
            sha.update(np.asarray(array, order="C").data)
        return sha.hexdigest()


def canonical_json(value: object) -> str:
    """Canonical JSON text: equal content gives equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def check_suffix(path: Path) -> None:
    """Validates the suffix of a file to write.

    Raises
    ------
    ArtifactError
        If it is neither `.safetensors` nor `.pkl`.
    """
    if path.suffix not in SUFFIXES:
        raise ArtifactError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}, got {path.suffix!r}")


def write(path: Path, stored: Stored) -> None:
    """Writes a file atomically.

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
    """True if a file has a kvgauge header, of any version and format."""
    try:
        text, _ = _parse(path, _read_bytes(path))
        return str(json.loads(text)["format"]).startswith("kvgauge.")
    except (ArtifactError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read(path: Path, expected_format: str, expected_version: int = FORMAT_VERSION) -> Stored:
    """Reads a file and verifies header, dtypes and digest.

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
        canonical_json(top)  # raises for NaN and infinity, which `json.loads` accepts
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifactError(
            f"{path}: the header is not the JSON object that kvgauge writes ({error})"
        ) from error
    if stored.format != expected_format:
        raise CorruptArtifactError(f"{path}: expected a file of format {expected_format}, got {stored.format!r:.60}")
    if type(version) is not int or version != expected_version:
        raise UnsupportedVersionError(
            f"{path}: {expected_format} of format version {version!r:.20}; this kvgauge reads version "
            f"{expected_version}. Install the kvgauge that wrote it, or write the file again."
        )
    foreign = sorted({str(array.dtype) for array in arrays.values()} - set(_DTYPES))
    if foreign:
        raise CorruptArtifactError(f"{path}: arrays must be of dtype {', '.join(_DTYPES)}; got {', '.join(foreign)}")
    if not isinstance(stored.header, dict) or stored.digest != digest:
        raise CorruptArtifactError(
            f"{path}: the content does not match its digest; the file was altered or damaged. Copy it again"
        )
    return stored


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path of a file to the errors that are raised inside the context."""
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
        raise CorruptArtifactError(f"{path}: the file is empty. Write or download it again")
    return data


def _parse(path: Path, data: bytes) -> tuple[str, dict[str, Array]]:
    # safetensors begins with a header length of 8 bytes, which may start with any byte, a pickle's 0x80 included.
    if data[8:9] == b"{":
        return _from_safetensors(path, data)
    if data[:1] == b"\x80":
        return _from_pickle(path, data)
    if data[:2] == b"PK":
        raise CorruptArtifactError(f"{path}: this is a zip archive such as torch.save writes, not a kvgauge file")
    raise CorruptArtifactError(f"{path}: expected a safetensors file or a pickle; got first bytes {data[:8]!r}")


def _to_safetensors(text: str, arrays: Mapping[str, Array]) -> bytes:
    from safetensors.numpy import save

    # One metadata key: safetensors writes several in the order of a hash map, and equal content gave different bytes.
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()}, {_METADATA_KEY: text})


def _from_safetensors(path: Path, data: bytes) -> tuple[str, dict[str, Array]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptArtifactError(
            f"{path}: damaged or incomplete safetensors file ({error}). Copy or download it again"
        ) from error
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
    pickler.fast = True  # no memo: bytes do not depend on which objects happen to be identical
    pickler.dump({_METADATA_KEY: text, "arrays": rows})
    return buffer.getvalue()


class _BuiltinsOnly(pickle.Unpickler):
    """Unpickler of builtin containers that raises for every reference to a class or function."""

    def find_class(self, module: str, name: str) -> Any:
        raise ArtifactError(f"it refers to {module}.{name}")


def _check_instructions(data: bytes) -> None:
    """Validates that a pickle uses only the instructions that `_to_pickle` writes.

    They make containers, texts, bytes and integers. Instructions that call or refer to code are not among them, and
    neither is the memo, with which a few bytes can claim gigabytes or nest a list in itself.

    Raises
    ------
    ArtifactError
        At the first other instruction.
    ValueError
        If the bytes are no pickle, or continue after its end.
    """
    position = -1
    for instruction, _, at in pickletools.genops(data):
        position = at or 0
        if instruction.name not in _INSTRUCTIONS:
            raise ArtifactError(f"it uses the instruction {instruction.name}")
    # `genops` and `load` stop at STOP: data behind it would go unnoticed, and equal content have several files.
    if position != len(data) - 1:
        raise InvalidValueError("data follows its end")


def _from_pickle(path: Path, data: bytes) -> tuple[str, dict[str, Array]]:
    try:
        _check_instructions(data)
        content = _BuiltinsOnly(io.BytesIO(data)).load()
    except ArtifactError as error:
        raise CorruptArtifactError(
            f"{path}: {error}, but a kvgauge pickle holds plain containers only; nothing in it was executed. "
            "For a pickle of another tool use: artifact convert FILE q.safetensors"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptArtifactError(
            f"{path}: damaged or incomplete pickle ({type(error).__name__}: {error!s:.100}). Copy or download it again"
        ) from error
    try:
        rows, text = content["arrays"], content[_METADATA_KEY]
        if not isinstance(text, str) or not isinstance(rows, list):
            raise TypeError("expected a text header and a list of arrays")
        return text, {row[0]: _to_array(*row) for row in rows}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptArtifactError(f"{path}: a pickle, but not one written by kvgauge ({error!s:.100})") from error


def _to_array(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Array:
    if not isinstance(name, str) or dtype not in _DTYPES or not isinstance(data, bytes):
        raise InvalidValueError(f"expected a named array of a known dtype; got {name!r:.60} of dtype {dtype!r:.20}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
