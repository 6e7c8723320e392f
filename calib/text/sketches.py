"""Digests of token windows, and sketches of their n-grams that tell texts apart without keeping them."""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from artifacts.errors import InvalidValueError
from calib.text.windows import Windows, require_at_least

NGRAM_TOKENS = 32
"""Length of n-grams: equal runs of 32 tokens in two texts are hardly ever chance."""


Sketch = Int64[Tensor, "hashes"]


def window_digests(windows: Windows) -> list[str]:
    """Fingerprint of 16 hexadecimal digits for each window, equal on every machine."""
    return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in windows.numpy().astype("<i8")]


def ngram_sketch(windows: Windows, *, ngram_tokens: int = NGRAM_TOKENS, capacity: int = 4096) -> Sketch:
    """Bottom-k sketch: the `capacity` smallest hashes of all n-grams, a uniform sample of the distinct n-grams.

    Membership of an n-gram depends on its hash alone, so sketches of two texts sample their common n-grams alike.

    Parameters
    ----------
    windows : Tensor
        Token ids; no n-gram spans two windows.
    ngram_tokens : int
        Length of an n-gram.
    capacity : int
        Most hashes to keep.

    Raises
    ------
    ValueError
        If the windows are shorter than an n-gram.

    References
    ----------
    Broder, On the resemblance and containment of documents, 1997 (bottom-k sketch).
    """
    require_at_least(capacity, "capacity", 1)
    return torch.from_numpy(np.unique(_ngram_hashes(windows, ngram_tokens))[:capacity])


def merge_sketches(*sketches: Int64[Tensor, "_"], capacity: int = 4096) -> Sketch:
    """Exact sketch of several texts together, independent of their order.

    Parameters
    ----------
    *sketches : Tensor
        Made by `ngram_sketch` with the same `ngram_tokens` and at least this capacity.
    capacity : int
        Most hashes to keep.
    """
    require_at_least(capacity, "capacity", 1)
    require_at_least(len(sketches), "number of sketches", 1)
    merged: Sketch = torch.unique(torch.cat(sketches))
    return merged[:capacity]


def overlap_fraction(
    windows: Windows, sketch: Sketch, ngram_tokens: int = NGRAM_TOKENS, *, capacity: int = 4096
) -> float:
    """Estimated fraction of the windows' n-grams that occur in the text of the sketch.

    It is the fraction found among n-grams whose hash lies in the range of the sketch. A sketch that is not full has all
    n-grams of its text, and the fraction is exact; otherwise m such n-grams give a standard error of at most
    1 / (2 sqrt(m)), somewhat more where text repeats.

    Parameters
    ----------
    windows : Tensor
        Token ids of the text to judge, for instance of the evaluation.
    sketch : Tensor
        Sketch of the other text, for instance of the calibration.
    ngram_tokens, capacity : int
        As given to `ngram_sketch`.

    Returns
    -------
    float
        From 0 to 1; nan if no n-gram of the windows falls into the sampled range: too little text to tell.
    """
    # A proportion p of m samples has the standard error sqrt(p (1 - p) / m), largest at p = 1/2.
    hashes, kept = _ngram_hashes(windows, ngram_tokens), sketch.numpy()
    # A full sketch is complete only up to its largest hash: judge the n-grams in that range.
    if len(kept) >= capacity:
        hashes = hashes[hashes <= kept[-1]]
    return float(np.isin(hashes, kept).mean()) if len(hashes) else float("nan")


def _ngram_hashes(windows: Windows, ngram_tokens: int) -> npt.NDArray[np.int64]:
    """Hashes of all n-grams, window by window."""
    require_at_least(ngram_tokens, "ngram_tokens", 1)
    n_starts = windows.shape[1] - ngram_tokens + 1
    if n_starts < 1:
        raise InvalidValueError(
            f"ngram_tokens: expected at most {windows.shape[1]}, the length of a window; got {ngram_tokens}; "
            "choose a smaller one for both texts"
        )
    # Polynomial hash by Horner's rule (Karp and Rabin 1987): h = sum_j mix(t_j) base^(n-1-j) modulo 2^64, for all
    # starts at once. Mixing again makes all bits uniform, as a bottom-k sketch needs; 63 bits fit a signed integer.
    tokens = _mix(windows.numpy().astype(np.uint64))
    base = np.uint64(0x9E3779B97F4A7C15)
    hashes = np.zeros((len(windows), n_starts), dtype=np.uint64)
    for offset in range(ngram_tokens):
        hashes = hashes * base + tokens[:, offset : offset + n_starts]
    return (_mix(hashes) >> np.uint64(1)).astype(np.int64).ravel()


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One step of splitmix64 (Steele, Lea, Flood 2014): a bijection; every input bit affects every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
