"""Windows to evaluate and the targets in them that count; the log of finished ones."""

from typing import TYPE_CHECKING, Any

from kvgauge.configuration.scoring import ScoringConfig
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from calib.text.corpus import Corpus
    from simquant.evaluation.scored_targets import ScoredTargets

_MOST_OF_C4 = 256
"""Windows of a text that is too long to be read whole, as without --stride."""


def scored_windows(
    config: ScoringConfig, corpus: "Corpus", seqlen: int, start_token: int | None = None
) -> "tuple[Tensor, ScoredTargets | None]":
    """The windows to evaluate, and which of their targets count (None: all but the first of each).

    Parameters
    ----------
    config : ScoringConfig
        With `stride` and `limit`.
    corpus : Corpus
        The text.
    seqlen : int
        Tokens of a window.
    start_token : int or None
        First token of every window, one of its tokens.

    Raises
    ------
    UsageError
        If the stride is longer than a window.
    """
    from calib.text.corpus import LazyDocuments
    from calib.text.windows import begun, split_windows, without_start
    from simquant.evaluation.scored_targets import strided_windows

    if config.stride is None:
        return split_windows(corpus, seqlen=seqlen, limit=config.limit, start_token=start_token), None
    if start_token is not None:
        windows, scored = scored_windows(config, without_start(corpus, seqlen, start_token), seqlen - 1)
        return begun(windows, start_token), scored
    if config.stride > seqlen:
        raise UsageError(f"--stride {config.stride}: windows of {seqlen} tokens would leave out what lies between them")
    limit = config.limit or (_MOST_OF_C4 if isinstance(corpus.documents, LazyDocuments) else None)
    return strided_windows(corpus.documents, seqlen=seqlen, stride=config.stride, limit=limit)


def scoring_settings(config: ScoringConfig, scored: "ScoredTargets | None", n_datasets: int = 1) -> dict[str, Any]:
    """Targets and log, as `simquant.evaluate` takes them.

    Raises
    ------
    UsageError
        If several data sets would share a log.
    """
    from simquant.evaluation.window_log import WindowLog

    if config.resume is not None and n_datasets > 1:
        raise UsageError(f"--resume {config.resume}: a log is of one text; evaluate one --dataset at a time")
    return {"scored": scored, "log": None if config.resume is None else WindowLog(config.resume)}
