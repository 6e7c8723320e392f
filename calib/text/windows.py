"""Token windows of equal length from a corpus: sampled for calibration, consecutive for evaluation."""

import random
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from artifacts.errors import InvalidValueError
from calib.text.corpus import Corpus, CorpusError, LazyDocuments
from calib.text.written import WrittenText

_C4_EVALUATION_WINDOWS = 256  # KVQuant's `get_c4`, with seed 0

_WRITTEN_EVALUATION_WINDOWS = 16

Windows = Int64[Tensor, "windows tokens"]


def sample_windows(
    corpus: Corpus | WrittenText, *, n_windows: int, seqlen: int, seed: int, start_token: int | None = None
) -> Windows:
    """Random windows, identical to those that KVQuant samples from the same token ids.

    In a stream the start is uniform. Of several documents one is drawn until it has more than `seqlen` tokens, then a
    start in it. (KVQuant stops with an error at a document of exactly `seqlen` tokens; here it is skipped.) As in
    KVQuant the very last token is never used.

    Parameters
    ----------
    corpus : Corpus or WrittenText
        Corpus to sample; a model writes as many windows as are asked for.
    n_windows : int
        Number of windows, from 1; they may overlap.
    seqlen : int
        Length of a window in tokens, from 2.
    seed : int
        Seed of the sampling; equal seeds give equal windows.
    start_token : int or None
        First token of every window, as of a prompt; counts as one of `seqlen`.

    Returns
    -------
    Int64[Tensor, "windows tokens"]
        Token ids, one window a row.

    Raises
    ------
    CorpusError
        If no document is long enough.
    ValueError
        If `n_windows` or `seqlen` is too small.

    References
    ----------
    arXiv:2401.18079, `quant/kvquant/datautils.py`.
    """
    require_at_least(n_windows, "n_windows", 1)
    if isinstance(corpus, WrittenText):
        require_at_least(seqlen, "seqlen", 2)
        return corpus.windows(n_windows, seqlen, seed, start_token)
    if start_token is not None:
        rest = without_start(corpus, seqlen, start_token)
        return begun(sample_windows(rest, n_windows=n_windows, seqlen=seqlen - 1, seed=seed), start_token)
    require_at_least(seqlen, "seqlen", 2)
    rng = random.Random(seed)
    too_short: dict[int, int] = {}
    windows = []
    # KVQuant's `get_wikitext2` and `get_c4`: random.Random(seed), start = randint(0, n - seqlen - 1), both inclusive.
    for _ in range(n_windows):
        document = _draw_document(corpus, seqlen, rng, too_short)
        start = rng.randint(0, len(document) - seqlen - 1)
        windows.append(document[start : start + seqlen])
    return torch.stack(windows)


def _draw_document(corpus: Corpus, seqlen: int, rng: random.Random, too_short: dict[int, int]) -> Int64[Tensor, "_"]:
    """First drawn document of more than `seqlen` tokens; lengths of shorter ones go to `too_short`."""
    n_documents = len(corpus.documents)
    while len(too_short) < n_documents:
        index = rng.randint(0, n_documents - 1) if n_documents > 1 else 0  # a stream costs no draw
        if index in too_short:
            continue
        document = corpus.documents[index]
        if len(document) > seqlen:
            return document
        too_short[index] = len(document)
    raise _too_short(corpus, seqlen + 1, max(too_short.values(), default=0))


def split_windows(
    corpus: Corpus | WrittenText, *, seqlen: int, limit: int | None = None, start_token: int | None = None
) -> Windows:
    """Consecutive windows without overlap; the remainder of a document is dropped.

    C4 is too long to be read whole: as in KVQuant, 256 windows are sampled from it with seed 0 (`sample_windows`).
    A model writes 16 windows with seed 0, or as many as `limit`.

    Parameters
    ----------
    corpus : Corpus or WrittenText
        Corpus to split.
    seqlen : int
        Length of a window in tokens, from 2.
    limit : int or None
        Largest number of windows, counted from the first.
    start_token : int or None
        First token of every window; see `sample_windows`.

    Raises
    ------
    CorpusError
        If no document holds a window.
    ValueError
        If `seqlen` or `limit` is too small.
    """
    if isinstance(corpus, WrittenText):
        n_windows = _WRITTEN_EVALUATION_WINDOWS if limit is None else limit
        return sample_windows(corpus, n_windows=n_windows, seqlen=seqlen, seed=0, start_token=start_token)
    if start_token is not None:
        rest = without_start(corpus, seqlen, start_token)
        return begun(split_windows(rest, seqlen=seqlen - 1, limit=limit), start_token)
    require_at_least(seqlen, "seqlen", 2)
    if limit is not None:
        require_at_least(limit, "limit", 1)
    if isinstance(corpus.documents, LazyDocuments):
        n_windows = min(_C4_EVALUATION_WINDOWS, limit or _C4_EVALUATION_WINDOWS)
        return sample_windows(corpus, n_windows=n_windows, seqlen=seqlen, seed=0)
    windows = torch.cat([tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen) for tokens in corpus.documents])
    if not len(windows):
        raise _too_short(corpus, seqlen, max(map(len, corpus.documents)))
    return windows[:limit]


def without_start(corpus: Corpus, seqlen: int, start_token: int) -> Corpus:
    """Corpus without start tokens at the beginning of its documents, for windows with their own.

    Parameters
    ----------
    corpus : Corpus
        Corpus of the windows.
    seqlen : int
        Length of a window in tokens, including the start token, from 3.
    start_token : int
        Token to remove from the beginning of a document.

    Raises
    ------
    ValueError
        If `seqlen` is too small.
    """
    require_at_least(seqlen, "seqlen", 3)

    def rest(tokens: Int64[Tensor, "_"]) -> Int64[Tensor, "_"]:
        return tokens[1:] if len(tokens) and tokens[0] == start_token else tokens

    documents = corpus.documents
    if isinstance(documents, LazyDocuments):
        return replace(corpus, documents=documents.changed(rest))
    return replace(corpus, documents=tuple(map(rest, documents)))


def begun(windows: Windows, start_token: int) -> Int64[Tensor, "windows longer"]:
    """Windows with a start token before each."""
    return torch.cat([torch.full_like(windows[:, :1], start_token), windows], 1)


def require_at_least(value: int, name: str, least: int) -> None:
    """Refuses a number below the least that makes sense.

    Raises
    ------
    ValueError
        If it is lower.
    """
    if value < least:
        raise InvalidValueError(f"{name}: expected at least {least}; got {value}")


def _too_short(corpus: Corpus, needed_tokens: int, longest_tokens: int) -> CorpusError:
    return CorpusError(
        f"{corpus.name}: expected at least {needed_tokens} tokens in one document; got {longest_tokens} in the longest "
        f"of {len(corpus.documents)}; shorten --seqlen or pass more text"
    )


def check_vocabulary(windows: Windows, vocab_size: int, name: str) -> None:
    """Checks that a model has embeddings for all token ids.

    Parameters
    ----------
    windows : Tensor
        Token ids.
    vocab_size : int
        Number of embeddings of the model.
    name : str
        Name of the corpus, for the message.

    Raises
    ------
    CorpusError
        If any id is negative or not below `vocab_size`.
    """
    outside = (windows < 0) | (windows >= vocab_size)
    if outside.any():
        raise CorpusError(
            f"{name}: expected token ids from 0 to {vocab_size - 1}; got {int(outside.sum())} outside, in a text whose "
            f"ids go from {int(windows.min())} to {int(windows.max())}; was it tokenised for another model?"
        )
