"""Formats of local files that are no text, known by how they begin or by their suffix, and what to do with each."""

from pathlib import Path

from calib.text.errors import CorpusError

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
ARROW = (b"\xff\xff\xff\xff", b"ARROW1")
NUMPY = b"\x93NUMPY"

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
"""How a file begins, what it then is, and what to do."""

_SUFFIXES = {
    **dict.fromkeys((".npz", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".hdf5", ".idx"), _IDS),
    ".bin": "where it holds bare token ids: numpy.save('ids.npy', numpy.fromfile('ids.bin', dtype='uint16')), with "
    "the dtype that it was written with",
    ".safetensors": "these are weights: name a text",
    **dict.fromkeys((".docx", ".xlsx", ".odt", ".epub"), _AS_TEXT),
}
"""What to do about files that go by these names, whatever they begin with."""

_CONTROL_SHARE = 0.01
"""Of control characters: text in another encoding has hardly any, binary data one byte in ten."""


def refuse_binary(path: Path, head: bytes) -> None:
    """Refuses a file whose beginning is that of a format that holds no text.

    Raises
    ------
    CorpusError
        With the format, and what to do.
    """
    suffix = _inner_suffix(path)
    if head[257:262] == b"ustar":
        raise CorpusError(f"{path}: expected text; got a tar archive; {_UNPACK}")
    for beginning, what, advice in _BEGINNINGS:
        if head.startswith(beginning):
            raise CorpusError(f"{path}: expected text; got {what}; {_SUFFIXES.get(suffix, advice)}")


def undecodable(path: Path, data: bytes, error: UnicodeDecodeError) -> CorpusError:
    """Why bytes are no UTF-8: they are binary data, or text in another encoding."""
    where = f"got byte 0x{data[error.start]:02x} at offset {error.start}"
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
    """Why bytes that decode are no text all the same."""
    return CorpusError(
        f"{path}: expected text; got a zero byte at offset {offset}; is it a binary file? {_binary_advice(path)}"
    )


def _binary_advice(path: Path) -> str:
    return _SUFFIXES.get(_inner_suffix(path), "name a text, or token ids as .npy")


def _inner_suffix(path: Path) -> str:
    """The suffix in lower case, that of compression left out."""
    return Path(path.name.lower().removesuffix(".gz")).suffix
