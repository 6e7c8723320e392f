"""Restricted unpickler for tensors and arrays, which runs no code of the file.

A pickle is a program that names functions and calls them. Here every name in such files maps to a function of this
module, which validates its arguments; every other name raises.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from artifacts.errors import CorruptArtifactError
from artifacts.storage import Array

_NUMBERS = ("f2", "f4", "f8", "i4", "i8")
_FORBIDDEN = ("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER")


def read_pickle(path: Path, data: bytes) -> Any:
    """Object of a pickle of containers, numbers, texts, tensors and arrays; arrays come as numpy arrays.

    Raises
    ------
    CorruptArtifactError
        If the pickle is damaged, or refers to anything else.
    """
    try:
        _check_instructions(data)
        return _plain(_Restricted(io.BytesIO(data)).load())
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptArtifactError(
            f"{path}: damaged or incomplete pickle ({type(error).__name__}: {error!s:.100}). Copy or download it again"
        ) from error


def _check_instructions(data: bytes) -> None:
    """Rejects instructions that refer to objects outside the file or claim more memo entries than it has bytes."""
    position = -1
    # A memo index is 4 bytes: without the check a few bytes make the unpickler allocate a table of gigabytes.
    for instruction, argument, at in pickletools.genops(data):
        position = at or 0
        if instruction.name in _FORBIDDEN:
            raise CorruptArtifactError(f"it uses the instruction {instruction.name}; nothing in it was executed")
        if "PUT" in instruction.name and (argument or 0) > len(data):
            raise CorruptArtifactError(f"expected at most one memo entry a byte; got {argument} in {len(data)} bytes")
    if position != len(data) - 1:
        raise CorruptArtifactError("data follows the end of the pickle")


class _Dtype:
    """Substitute for `numpy.dtype`: plain number types only."""

    def __init__(self, name: str, *_: object) -> None:
        if name not in _NUMBERS:
            raise CorruptArtifactError(f"expected arrays of dtype {', '.join(_NUMBERS)}; got {name!r:.40}")
        self.numpy = np.dtype(f"<{name}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise CorruptArtifactError(f"expected little-endian arrays; got byte order {state[1]!r:.10}")


class _Array:
    """Substitute for `numpy.ndarray`, which a pickle creates first and fills afterwards."""

    array: Array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _from_buffer(data, dtype, shape, "F" if fortran else "C").array


def _from_buffer(data: Any, dtype: _Dtype, shape: Any, order: Any, *_: object) -> _Array:
    made = _Array()
    made.array = np.frombuffer(bytes(data), dtype.numpy).reshape(shape, order=order).copy()
    return made


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> float:
    return float(np.frombuffer(data, dtype.numpy)[0])


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise CorruptArtifactError(f"expected bytes in the encoding latin1; got {encoding!r:.20}")
    return text.encode("latin1")


def _storage(data: bytes) -> Any:
    """Storage of a tensor, which is in the pickle as a nested file."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise CorruptArtifactError(f"expected a tensor over a storage; got one over {type(storage).__name__}")
    if any(step < 0 for step in stride):
        raise CorruptArtifactError(f"expected a tensor with strides from 0; got {stride}")
    whole = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    # Index of the last element; with all strides from 0 the first is the smallest, so both ends lie in the storage.
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or last >= len(whole) or any(n < 1 for n in size) or int(np.prod(size)) > len(whole):
        raise CorruptArtifactError(
            f"expected a tensor inside its storage of {len(whole)} numbers; got shape {size}, strides {stride}, "
            f"offset {offset}"
        )
    return whole.as_strided(size, stride, offset).clone()


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CorruptArtifactError(
                f"it refers to {module}.{name}, which no quantizer file needs; nothing in it was executed. "
                "Do not load this file with another program."
            )
        return _ALLOWED[module, name]


def _plain(value: Any, depth: int = 0) -> Any:
    """The object with numpy arrays in place of the substitutes."""
    if depth > 8:  # quantizer files are nested four levels deep at most
        raise CorruptArtifactError("expected containers nested at most 8 levels deep; got more")
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, depth + 1) for item in value)
    return value
