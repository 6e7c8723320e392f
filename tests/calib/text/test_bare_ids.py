"""Bare token ids: every writer's file is read as it was meant, and what is none is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from calib.text.bare_ids import read_bare_ids
from calib.text.corpus import CorpusError, check_dataset, load_corpus

IDS = [5, 0, 49151, 17, 300, 2, 2]

LARGE = [5, 0, 128000, 17, 65536, 2, 70000]


def write(path: Path, ids: list[int], dtype: str, header: bytes = b"") -> Path:
    path.write_bytes(header + np.array(ids, dtype).tobytes())
    return path


def llm_c(magic: int, version: int, n_tokens: int) -> bytes:
    return np.array([magic, version, n_tokens, *[0] * 253], "<i4").tobytes()


@pytest.mark.parametrize(
    ("ids", "dtype", "vocab_size"),
    [
        (IDS, "<u2", 49152),
        (IDS, "<u2", 65536),
        (LARGE, "<u4", 128256),
        (IDS, "<u4", 49152),
        (IDS, "<i8", 49152),
        (LARGE, "<i8", 128256),
        ([7], "<u2", 8),
    ],
)
def test_the_vocabulary_and_zeros_tell_the_width(tmp_path: Path, ids: list[int], dtype: str, vocab_size: int) -> None:
    assert read_bare_ids(write(tmp_path / "a.bin", ids, dtype), vocab_size).tolist() == ids


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_headers_of_llm_c(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    path = write(tmp_path / "a.bin", IDS, dtype, llm_c(magic, version, len(IDS)))
    assert read_bare_ids(path, 49152).tolist() == IDS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorpusError, match=r"llm\.c's header .*; got version . and 7 tokens; was it copied"):
        read_bare_ids(path, 49152)


@pytest.mark.parametrize(("code", "dtype"), [(4, "<i4"), (8, "<u2"), (3, "<i2")])
def test_an_index_of_megatron_tells_the_type(tmp_path: Path, code: int, dtype: str) -> None:
    path = write(tmp_path / "a.bin", [1, 2, 3, 4], dtype)
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code) + bytes(32))
    assert read_bare_ids(path, 128256).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("head", [b"", b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 6), b"TNTIDX\x00\x00" + bytes(20)])
def test_another_index_is_refused(tmp_path: Path, head: bytes) -> None:
    path = write(tmp_path / "a.bin", IDS, "<u2")
    (tmp_path / "a.idx").write_bytes(head)
    with pytest.raises(CorpusError, match=r"a\.idx: expected Megatron's index of integers; .*numpy\.save"):
        read_bare_ids(path, 49152)


@pytest.mark.parametrize(
    ("data", "vocab_size", "match"),
    [
        (np.array(IDS, "<u2").tobytes(), 1000, "ids from 0 to 999; read as uint16 1 of 7 are outside; .*numpy.save"),
        (np.array([5, -1, 3], "<i4").tobytes(), 128256, "read as uint32 1 of 3 are outside"),
        (b"\xffbc", 49152, "ids of 16 bits; got 3 bytes, no whole number"),
        (b"abcdef", 128256, "got text; rename it to .txt"),
        ("Once upon a time there was a naïve text. ".encode() * 30, 49152, "got text; rename it to .txt"),
        (b"PK\x03\x04" + bytes(60), 49152, "a zip archive, as torch writes weights"),
    ],
)
def test_what_is_no_text_of_this_model_is_refused(tmp_path: Path, data: bytes, vocab_size: int, match: str) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(CorpusError, match=match):
        read_bare_ids(tmp_path / "a.bin", vocab_size)


def test_bare_ids_are_a_data_set(tmp_path: Path) -> None:
    path = str(write(tmp_path / "A.BIN", IDS, "<u2"))
    check_dataset(path)
    corpus = load_corpus(path, "evaluation", None, vocab_size=49152)
    assert (corpus.name, [tokens.tolist() for tokens in corpus.documents]) == ("A.BIN", [IDS])
    with pytest.raises(CorpusError, match="need the size of the vocabulary"):
        load_corpus(path, "evaluation", None)
