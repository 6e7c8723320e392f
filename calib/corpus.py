"""Texts as token ids: the data sets of the papers, and local files."""

import codecs
import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from calib.demo.pages import demo_text

logger = logging.getLogger(__name__)

Split = Literal["calibration", "evaluation"]
Tokenizer = Callable[[str], Sequence[int]]

_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_HUB_TIMEOUT_SECONDS = 5.0


class CorpusError(ValueError):
    """A text or data set cannot be used."""


class LazyDocuments:
    """Documents that are tokenised when taken: C4 has far more of them than a run draws.

    Parameters
    ----------
    texts : Sequence of str
        One text per document.
    tokenizer : Callable
        Text to token ids.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._texts = texts
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Int64[Tensor, "tokens"]:
        return torch.as_tensor(self._tokenizer(self._texts[index]), dtype=torch.int64)

    def __iter__(self) -> Iterator[Int64[Tensor, "_"]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of a text, with a fingerprint. Two corpora are equal if names and digests are.

    Parameters
    ----------
    name : str
        `demo`, `wikitext2`, `ptb`, `c4`, or the name of a local file without its folders: it is written into artifacts.
    documents : tuple of Tensor or LazyDocuments
        Token ids. One document is a stream, in which a window may start anywhere; no window spans two documents.
    digest : str
        SHA-256 of the token ids and document boundaries. For C4, which is never tokenised whole, of its source and
        number of documents and the token ids of the first eight.
    """

    name: str
    documents: tuple[Int64[Tensor, "_"], ...] | LazyDocuments = field(compare=False, repr=False)
    digest: str


@dataclass(frozen=True, kw_only=True)
class _HubDataset:
    """Where a data set lies on the hub, and how its rows become text.

    A `separator` joins all rows into one stream; without one, every row is a document.
    """

    repository: str
    config: str | None = None
    revision: str | None = None
    evaluation: str = "test"
    files: Mapping[str, str] = field(default_factory=dict)
    column: str = "text"
    separator: str | None = None
    local_example: str

    def rows(self, part: str) -> Sequence[str]:
        import datasets

        loaded = datasets.load_dataset(
            self.repository,
            self.config,
            revision=self.revision,
            data_files={part: self.files[part]} if self.files else None,
            split=part,
            # The dataset card counts all shards; against one of them the check fails (datasets issue 7728).
            verification_mode="no_checks" if self.files else None,
        )
        rows: Sequence[str] = loaded[self.column]
        return rows


# wikitext2 and c4 as in KVQuant; ptb as GPTQ's `ptb_new` (joined by a space, evaluated on test), the variant that
# published tables quote. Its older `ptb` joins by blank lines and evaluates on validation.
_HUB_DATASETS = {
    "wikitext2": _HubDataset(
        repository="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        separator="\n\n",
        local_example="path/to/wiki.train.raw",
    ),
    "ptb": _HubDataset(
        repository="ptb-text-only/ptb_text_only",
        config="penn_treebank",
        revision="refs/convert/parquet",  # the main branch is a loading script, which datasets no longer runs
        column="sentence",
        separator=" ",
        local_example="path/to/ptb.train.txt",
    ),
    "c4": _HubDataset(
        repository="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        evaluation="validation",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        local_example="path/to/c4.txt",
    ),
}

KNOWN_DATASETS = ("demo", *_HUB_DATASETS)


def load_corpus(dataset: str, split: Split, tokenizer: Tokenizer | None, *, field: str = "text") -> Corpus:
    r"""The token ids of a known data set or a local file.

    Parameters
    ----------
    dataset : str
        `demo`, `wikitext2`, `ptb`, `c4`, or a path: `.jsonl` (one object per line, texts joined by a blank line),
        `.npy` (integer token ids: 1-D a stream, 2-D one document per row), any other suffix UTF-8 text, as it is.
    split : {'calibration', 'evaluation'}
        The part of a known data set: train, or test (validation for C4, held-out pages for demo). A local file is
        used whole.
    tokenizer : Callable or None
        Text to token ids; not needed for `.npy`.
    field : str
        The key that holds the text in a `.jsonl` file.

    Raises
    ------
    CorpusError
        If the text cannot be had, is empty, or is not what its suffix says.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
    >>> _ = path.write_text("abc")
    >>> load_corpus(str(path), "calibration", lambda text: list(text.encode())).documents
    (tensor([97, 98, 99]),)
    """
    if split not in get_args(Split):
        raise ValueError(f"load_corpus: expected split {' or '.join(get_args(Split))}; got {split!r}")
    path = Path(dataset)
    if path.suffix == ".npy":
        documents = _read_token_ids(path)
        return Corpus(name=path.name, documents=documents, digest=_digest(documents))
    if tokenizer is None:
        raise CorpusError(f"{dataset}: text needs a tokenizer; got none; pass one, or a .npy file of token ids")
    if dataset == "demo":
        return _stream(dataset, demo_text("training" if split == "calibration" else "held-out"), tokenizer)
    if dataset in _HUB_DATASETS:
        return _load_from_hub(dataset, split, tokenizer)
    if path.suffix == ".json":
        raise CorpusError(f"{dataset}: expected text; got a .json file; write one object per line into a .jsonl file")
    text = _read_jsonl(path, field) if path.suffix == ".jsonl" else _read_text(path)
    return _stream(path.name, text, tokenizer)


def check_dataset(dataset: str) -> None:
    """The name is that of a known data set or of a file with content; to be asked before a model is loaded.

    Raises
    ------
    CorpusError
        If it is neither.
    """
    if dataset not in KNOWN_DATASETS:
        _check_file(Path(dataset))


def _stream(name: str, text: str, tokenizer: Tokenizer) -> Corpus:
    tokens = torch.as_tensor(tokenizer(text), dtype=torch.int64)
    if not text.strip() or not len(tokens):
        raise CorpusError(f"{name}: expected text; got {len(text)} characters, {len(tokens)} tokens; pass another file")
    return Corpus(name=name, documents=(tokens,), digest=_digest([tokens]))


def _digest(documents: Iterable[Int64[Tensor, "_"]], source: str = "") -> str:
    digest = hashlib.sha256(source.encode())
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _load_from_hub(name: str, split: Split, tokenizer: Tokenizer) -> Corpus:
    dataset = _HUB_DATASETS[name]
    part = dataset.evaluation if split == "evaluation" else "train"
    try:
        with _offline_if_unreachable():
            rows = dataset.rows(part)
    except Exception as error:  # datasets and the hub client raise from a dozen unrelated hierarchies
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CorpusError(
            f"{name}: expected {dataset.repository} from the hub or its local cache; got {cause}; pass a local file "
            f"instead, e.g. --dataset {dataset.local_example}, or .jsonl with a field `text`"
        ) from error
    if dataset.separator is not None:
        return _stream(name, dataset.separator.join(rows), tokenizer)
    documents = LazyDocuments(rows, tokenizer)
    source = f"{dataset.repository}@{dataset.revision}:{part}:{len(documents)}"
    return Corpus(name=name, documents=documents, digest=_digest(islice(documents, 8), source))


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Without a network the hub client retries for 23 s before it looks into its cache; offline it looks at once."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub_answers(datasets.config.HF_ENDPOINT)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def hub_answers(endpoint: str) -> bool:
    """Whether the hub can be reached, found out once and quickly instead of after many retries."""
    from huggingface_hub import get_session  # the client that datasets uses: same proxies, same certificates

    try:
        get_session().head(endpoint, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:  # the client's exceptions changed their package twice
        logger.warning("no answer from %s (%s): looking only into the local cache", endpoint, error)
        return False
    return True


def _check_file(path: Path) -> None:
    """Refuse what is not a file with content, before its format is looked at."""
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


def _read_text(path: Path) -> str:
    _check_file(path)
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


def _read_jsonl(path: Path, field: str) -> str:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = _read_text(path).rstrip().split("\n")
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


def _read_token_ids(path: Path) -> tuple[Int64[Tensor, "_"], ...]:
    _check_file(path)
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
