"""Corpora: token ids of known data sets and of local files."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from artifacts.errors import InvalidValueError
from calib.demo.pages import demo_text
from calib.text.conversations import ChatTemplate, Conversation
from calib.text.errors import CorpusError
from calib.text.hub_datasets import HUB_DATASETS, KNOWN_DATASETS, SELF, hub_rows
from calib.text.king_james import king_james_text
from calib.text.local_files import check_file, is_token_ids, read_local_records, read_token_ids
from calib.text.padding import PaddingIds
from calib.text.records import Records, Split

Tokenizer = Callable[[str], Sequence[int]]
"""Text to token ids."""

__all__ = ["Corpus", "CorpusError", "LazyDocuments", "PaddingIds", "Split", "check_dataset", "load_corpus"]

_NO_PADDING = PaddingIds()


class LazyDocuments:
    """Documents that are tokenised on access: C4 has far more of them than a run samples.

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

    def changed(self, change: Callable[[Int64[Tensor, "_"]], Int64[Tensor, "_"]]) -> "LazyDocuments":
        """The same documents, with a function applied on access."""
        return LazyDocuments(self._texts, lambda text: change(self._tokens(text)).tolist())

    def _tokens(self, text: str) -> Int64[Tensor, "_"]:
        return torch.as_tensor(self._tokenizer(text), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Int64[Tensor, "tokens"]:
        return self._tokens(self._texts[index])

    def __iter__(self) -> Iterator[Int64[Tensor, "_"]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of a text, with a fingerprint; two corpora are equal if their names and digests are.

    Parameters
    ----------
    name : str
        `demo`, `kjv`, `wikitext2`, `ptb`, `c4`, or the name of a local file without its folders: it is written into
        artifacts.
    documents : tuple of Tensor or LazyDocuments
        Token ids. A single document is a stream, in which a window may start anywhere; no window spans two documents.
    digest : str
        SHA-256 of the token ids and document boundaries. For C4, which is never tokenised whole, of its source and
        number of documents and the token ids of the first eight.
    """

    name: str
    documents: tuple[Int64[Tensor, "_"], ...] | LazyDocuments = field(compare=False, repr=False)
    digest: str


def load_corpus(
    dataset: str,
    split: Split,
    tokenizer: Tokenizer | None,
    *,
    field: str = "text",
    padding: PaddingIds = _NO_PADDING,
    chat: ChatTemplate | None = None,
    vocab_size: int | None = None,
) -> Corpus:
    r"""Token ids of a known data set or a local file.

    Parameters
    ----------
    dataset : str
        `demo`, `kjv`, `wikitext2`, `ptb`, `c4`, or a path: `.npy` (integer token ids: 1-D a stream, 2-D one document
        per row, without the padding at its ends); `.bin` (bare token ids, a stream); records (`.jsonl`, `.ndjson`,
        `.jsonlines`, `.csv`, `.tsv`, `.parquet`, `.arrow`, a folder that `datasets` saved), whose texts are joined by
        blank lines, and whose conversations follow one another as the chat template writes them; any other suffix
        UTF-8 text. All texts may be compressed, `.gz`; Windows' line ends and a byte order mark do not count.
    split : {'calibration', 'evaluation'}
        The part of a known data set: train, or test (validation for C4, held-out pages for demo). A local file is
        used whole.
    tokenizer : Callable or None
        Text to token ids; not needed for `.npy` and `.bin`.
    field : str
        The key or the column that holds the text of a record.
    padding : PaddingIds
        Padding tokens in the rows of a `.npy` file.
    chat : Callable or None
        Messages to token ids, for conversations: the tokenizer's chat template.
    vocab_size : int or None
        Number of token ids that the model knows, for `.bin`.

    Returns
    -------
    Corpus
        To be cut by `sample_windows` or `split_windows`.

    Raises
    ------
    CorpusError
        If the text is not available, is empty or not text, or the file contradicts its suffix.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
    >>> _ = path.write_text("abc")
    >>> load_corpus(str(path), "calibration", lambda text: list(text.encode())).documents
    (tensor([97, 98, 99]),)
    """
    if split not in get_args(Split):
        raise InvalidValueError(f"load_corpus: expected split {' or '.join(get_args(Split))}; got {split!r}")
    path = Path(dataset)
    if dataset not in KNOWN_DATASETS and is_token_ids(path):
        documents = read_token_ids(path, padding, vocab_size)
        return Corpus(name=path.name, documents=documents, digest=_digest(documents))
    if dataset == SELF:
        raise CorpusError("self: text of a model's own is written by the model; use calib.text.written.WrittenText")
    if tokenizer is None:
        raise CorpusError(f"{dataset}: text needs a tokenizer; got none; pass one, or a .npy file of token ids")
    if dataset == "demo":
        return _stream(dataset, demo_text("training" if split == "calibration" else "held-out"), tokenizer)
    if dataset == "kjv":
        return _stream(dataset, king_james_text(split), tokenizer)
    if dataset in HUB_DATASETS:
        return _of_hub(dataset, split, tokenizer)
    return _of_records(path.name, read_local_records(path, field, split), tokenizer, chat)


def check_dataset(dataset: str) -> None:
    """Checks, before a model is loaded, that a name is a known data set or a file with content.

    Raises
    ------
    CorpusError
        If it is neither.
    """
    if dataset not in KNOWN_DATASETS:
        check_file(Path(dataset))


def _stream(name: str, text: str, tokenizer: Tokenizer) -> Corpus:
    tokens = torch.as_tensor(tokenizer(text), dtype=torch.int64)
    if not text.strip() or not len(tokens):
        raise CorpusError(f"{name}: expected text; got {len(text)} characters, {len(tokens)} tokens; pass another file")
    return Corpus(name=name, documents=(tokens,), digest=_digest([tokens]))


def _of_records(name: str, records: Records, tokenizer: Tokenizer, chat: ChatTemplate | None) -> Corpus:
    """One stream: texts with blank lines between, conversations one after the other, as models are trained on them."""
    chats = [record.tokens(chat) for record in records if isinstance(record, Conversation)]
    if not chats:
        return _stream(name, "\n\n".join(record for record in records if isinstance(record, str)), tokenizer)
    tokens = torch.tensor([token for chat in chats for token in chat], dtype=torch.int64)
    return Corpus(name=name, documents=(tokens,), digest=_digest([tokens]))


def _digest(documents: Iterable[Int64[Tensor, "_"]], source: str = "") -> str:
    digest = hashlib.sha256(source.encode())
    for document in documents:
        # The length first, so that the same tokens in other documents have another digest.
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _of_hub(name: str, split: Split, tokenizer: Tokenizer) -> Corpus:
    dataset = HUB_DATASETS[name]
    part = dataset.evaluation if split == "evaluation" else "train"
    rows = hub_rows(name, part)
    if dataset.separator is not None:
        return _stream(name, dataset.separator.join(rows), tokenizer)
    # Tokenising all of C4 for a digest takes far longer than a run: identify it by revision, size and eight documents.
    documents = LazyDocuments(rows, tokenizer)
    source = f"{dataset.repository}@{dataset.revision}:{part}:{len(documents)}"
    return Corpus(name=name, documents=documents, digest=_digest(islice(documents, 8), source))
