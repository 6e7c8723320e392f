"""Bare token ids, `.bin`: of nanoGPT without a header, of llm.c with its own, of Megatron with an index beside."""

import struct
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from calib.text.errors import CorpusError

_LLM_C = {20240520: ("<u2", 1), 20240801: ("<u4", 7)}
"""First number of llm.c's header of 256 int32: type of the ids, and version (`dev/data/data_common.py`)."""

_HEADER_BYTES = 1024

_MEGATRON = b"MMIDIDX\x00\x00"

_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of integers in Megatron's index (`megatron/core/datasets/indexed_dataset.py`)."""

_ZIP = b"PK\x03\x04"

_UINT16_VOCABULARY = 65_536


def read_bare_ids(path: Path, vocab_size: int | None) -> Int64[Tensor, "tokens"]:
    """Token ids of a `.bin` file as one stream.

    An index or a header tells their type. Without either they are unsigned little-endian, of 16 bits where the
    vocabulary has at most 65,536 tokens, else of 32; wider ones are known by their zeros.

    Parameters
    ----------
    path : Path
        The file; Megatron's index lies beside it, with the suffix `.idx`.
    vocab_size : int or None
        Number of token ids that the model knows.

    Raises
    ------
    CorpusError
        If the file is none of these, or holds ids beyond the vocabulary.
    """
    data = path.read_bytes()
    if vocab_size is None:
        raise CorpusError(f"{path}: ids without their type need the size of the vocabulary; pass vocab_size, or .npy")
    index = path.with_suffix(".idx")
    if index.exists():
        ids = _as_type(path, data, _megatron_type(index))
    elif len(data) >= _HEADER_BYTES and struct.unpack("<i", data[:4])[0] in _LLM_C:
        ids = _llm_c(path, data)
    else:
        _check_not_other(path, data)
        ids = _widened(_as_type(path, data, "<u2" if vocab_size <= _UINT16_VOCABULARY else "<u4"))
    _check_vocabulary(path, ids, vocab_size)
    return torch.from_numpy(ids.astype(np.int64))


def _as_type(path: Path, data: bytes, kind: str) -> np.ndarray:
    width = np.dtype(kind).itemsize
    if not data or len(data) % width:
        raise CorpusError(
            f"{path}: expected token ids of {8 * width} bits; got {len(data)} bytes, no whole number of them; was it "
            "copied completely? Of other types write a .npy file with numpy.save"
        )
    return np.frombuffer(data, kind)


def _widened(ids: np.ndarray) -> np.ndarray:
    """The ids as twice as wide, as long as every second number is zero: text has no such token ids."""
    while ids.itemsize < 8 and len(ids) > 2 and not len(ids) % 2 and ids[::2].any() and not ids[1::2].any():
        ids = ids.view(f"<u{2 * ids.itemsize}")
    return ids


def _llm_c(path: Path, data: bytes) -> np.ndarray:
    magic, version, n_tokens = struct.unpack("<3i", data[:12])
    kind, known = _LLM_C[magic]
    ids = _as_type(path, data[_HEADER_BYTES:], kind)
    if version != known or n_tokens != len(ids):
        raise CorpusError(
            f"{path}: expected llm.c's header of version {known} and {len(ids)} tokens; got version {version} and "
            f"{n_tokens} tokens; was it copied completely?"
        )
    return ids


def _megatron_type(index: Path) -> str:
    """Type of the ids. Documents are not told apart: as in training they follow one another."""
    head = index.read_bytes()[:18]
    kind = _MEGATRON_TYPES.get(head[17]) if len(head) == 18 and head.startswith(_MEGATRON) else None
    if kind is None:
        raise CorpusError(
            f"{index}: expected Megatron's index of integers; got {head!r}; move the file away if it does not belong "
            "to the .bin, or write the ids with numpy.save into a .npy file"
        )
    return kind


def _check_not_other(path: Path, data: bytes) -> None:
    """Raises for weights, and for text, whose pairs of letters are token ids, too.

    Raises
    ------
    CorpusError
        If the file begins as these do.
    """
    if data.startswith(_ZIP):
        raise CorpusError(f"{path}: expected token ids; got a zip archive, as torch writes weights; name a text")
    try:
        beginning = data[:512].decode("utf-8", "strict" if len(data) <= 512 else "ignore")
    except UnicodeDecodeError:
        return
    whole = len(beginning.encode()) > min(len(data), 512) - 4  # a letter may be cut at the end
    if whole and all(letter.isprintable() or letter in "\t\r\n" for letter in beginning):
        raise CorpusError(f"{path}: expected token ids; got text; rename it to .txt")


def _check_vocabulary(path: Path, ids: np.ndarray, vocab_size: int) -> None:
    outside = int(((ids < 0) | (ids >= vocab_size)).sum())
    if outside:
        raise CorpusError(
            f"{path}: expected token ids from 0 to {vocab_size - 1}; read as {ids.dtype.name} {outside} of {len(ids)} "
            "are outside; was it tokenised for another model, or written with another type? Then write a .npy file "
            "with numpy.save"
        )
