"""Scored targets of windows, and strided windows that give every scored target context."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from artifacts.errors import InvalidValueError
from simquant.evaluation.scoring import Scores


@dataclass(frozen=True, eq=False)
class ScoredTargets:
    """Number of scored targets at the end of each window; the tokens before them are context.

    Parameters
    ----------
    n_scored : tuple of int
        Scored targets of each window, from 1 to its tokens less one.
    stride : int or None
        Tokens from the start of a window to that of the next; None for windows that share no tokens.
    """

    n_scored: tuple[int, ...]
    stride: int | None = None

    def split(self, batch_size: int) -> list[tuple[int, ...]]:
        """Numbers of scored targets, batch by batch."""
        return [self.n_scored[first : first + batch_size] for first in range(0, len(self.n_scored), batch_size)]

    def clusters(self, scores: Sequence[Scores], window_tokens: int) -> list[Scores]:
        """Scores joined in clusters for standard errors: windows, or runs of strided windows of one window's length.

        Parameters
        ----------
        scores : Sequence[Scores]
            Scores of each window.
        window_tokens : int
            Length of a window.
        """
        # Windows less than a window's length apart share tokens, so that their losses are correlated. ceil(length /
        # stride) consecutive ones form a cluster; two clusters share tokens only around their border.
        size = 1 if self.stride is None else math.ceil(window_tokens / self.stride)
        return [Scores.cat(scores[first : first + size]) for first in range(0, len(scores), size)]

    def describe(self) -> str:
        """Phrase for reports."""
        if self.stride is None:
            return "all but the first of each scored"
        return f"each {self.stride} tokens ahead of the last and scored on as many, a text's first window on all"


def scored_targets(
    windows: Int64[Tensor, "windows tokens"], scored: ScoredTargets | None, normalization: str
) -> ScoredTargets:
    """Targets to score, checked against the windows; by default all tokens but the first of each window.

    Raises
    ------
    ValueError
        If there are no windows or no targets, or the normalization does not suit strided windows.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidValueError(
            f"windows: expected at least one window of at least 2 tokens; got shape {tuple(windows.shape)}. Use a "
            "longer text or a smaller seqlen"
        )
    n_windows, most = windows.shape[0], windows.shape[1] - 1
    scored = ScoredTargets((most,) * n_windows) if scored is None else scored
    if len(scored.n_scored) != n_windows or not all(1 <= n <= most for n in scored.n_scored):
        raise InvalidValueError(
            f"scored targets: expected {n_windows} numbers from 1 to {most}, one for each window of {most + 1} tokens; "
            f"got {len(scored.n_scored)}, from {min(scored.n_scored, default=None)} to "
            f"{max(scored.n_scored, default=None)}. Take windows and targets from the same call of `strided_windows`"
        )
    if scored.stride is not None and normalization != "targets":
        raise InvalidValueError(
            f"normalization: {normalization!r} averages windows with equally many scored targets; got windows with a "
            f"stride of {scored.stride} tokens. Use 'targets'"
        )
    return scored


def strided_windows(
    documents: Iterable[Int64[Tensor, "_"]], *, seqlen: int, stride: int, limit: int | None = None
) -> tuple[Int64[Tensor, "windows tokens"], ScoredTargets]:
    """Strided windows, and the targets to score so that every target counts once.

    Each window of a document starts `stride` tokens after the one before and scores its last `stride` targets; the
    first window scores all of its targets. All windows have `seqlen` tokens: the rest of a document is dropped.

    Parameters
    ----------
    documents : iterable of Int64[Tensor, "tokens"]
        Token ids; no window spans two documents.
    seqlen : int
        Length of a window in tokens, from 2.
    stride : int
        Distance of windows in tokens, from 1 to `seqlen`. At `seqlen` windows share no tokens, and the first token of
        each is not scored.
    limit : int or None
        Maximum number of windows.

    Raises
    ------
    ValueError
        If the numbers are out of range, or no document has `seqlen` tokens.

    References
    ----------
    transformers documentation, "Perplexity of fixed-length models": the strided sliding window.
    """
    if seqlen < 2 or not 1 <= stride <= seqlen or (limit is not None and limit < 1):
        raise InvalidValueError(
            "strided windows: expected seqlen from 2, stride from 1 to seqlen and a limit from 1; "
            f"got seqlen={seqlen}, stride={stride}, limit={limit}"
        )
    parts: list[Tensor] = []
    n_scored: list[int] = []
    for document in documents:
        if limit is not None and len(n_scored) >= limit:
            break
        if len(document) >= seqlen:
            parts.append(document.unfold(0, seqlen, stride))  # a view: overlaps are in memory once
            n_scored += [seqlen - 1] + [min(stride, seqlen - 1)] * (len(parts[-1]) - 1)
    if not parts:
        raise InvalidValueError(
            f"strided windows: expected a document of at least {seqlen} tokens; got none. Use a smaller seqlen or a "
            "longer text"
        )
    windows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return windows[:limit], ScoredTargets(tuple(n_scored[:limit]), stride)
