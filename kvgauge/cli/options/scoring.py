"""Options of the command line that say which targets are scored, and what is found beside the losses."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgauge.cli.options import common as options
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from calib.text.corpus import Corpus
    from simquant.evaluation.scored_targets import ScoredTargets

_MOST_OF_C4 = 256
"""Windows of a text that is too long to be read whole, as without --stride."""


OF_TEXTS = ("bos", "stride", "resume", "site_losses", "clipping")
"""Names of options that go with losses on texts alone."""


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Strides, a log to go on from, and figures of single sites."""
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--stride",
        type=options.positive,
        metavar="N",
        help="windows overlap: each begins N tokens after the one before and scores its last N targets, the tokens "
        "before them are context (default: windows side by side, scored whole)",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep the scores of finished windows in FILE, and do not run again those that an interrupted run of the "
        "same evaluation has left there",
    )
    group.add_argument(
        "--site-losses",
        type=options.positive,
        metavar="N",
        help="also quantize the keys and the values of each layer alone, on the first N windows: a pass more for each",
    )
    group.add_argument(
        "--clipping",
        action="store_true",
        help="also count the values beyond the ranges that calibration fitted, here and in the calibration text",
    )


def scoring_windows(
    args: argparse.Namespace, corpus: "Corpus", seqlen: int, start_token: int | None = None
) -> "tuple[Tensor, ScoredTargets | None]":
    """The windows to evaluate, and which of their targets count (None: all but the first of each).

    Parameters
    ----------
    args : argparse.Namespace
        With `stride` and `limit`.
    corpus : Corpus
        The text.
    seqlen : int
        Tokens of a window.
    start_token : int or None
        What every window begins with, as one of its tokens.

    Raises
    ------
    UsageError
        If the stride is longer than a window.
    """
    from calib.text.corpus import LazyDocuments
    from calib.text.windows import begun, split_windows, without_start
    from simquant.evaluation.scored_targets import strided_windows

    if args.stride is None:
        return split_windows(corpus, seqlen=seqlen, limit=args.limit, start_token=start_token), None
    if start_token is not None:
        windows, scored = scoring_windows(args, without_start(corpus, seqlen, start_token), seqlen - 1)
        return begun(windows, start_token), scored
    if args.stride > seqlen:
        raise UsageError(f"--stride {args.stride}: windows of {seqlen} tokens would leave out what lies between them")
    limit = args.limit or (_MOST_OF_C4 if isinstance(corpus.documents, LazyDocuments) else None)
    return strided_windows(corpus.documents, seqlen=seqlen, stride=args.stride, limit=limit)


def scoring_settings(args: argparse.Namespace, scored: "ScoredTargets | None", n_datasets: int = 1) -> dict[str, Any]:
    """What `simquant.evaluate` is told about targets and the log.

    Raises
    ------
    UsageError
        If several data sets would share a log.
    """
    from simquant.evaluation.window_log import WindowLog

    if args.resume is not None and n_datasets > 1:
        raise UsageError(f"--resume {args.resume}: a log is of one text; evaluate one --dataset at a time")
    return {"scored": scored, "log": None if args.resume is None else WindowLog(args.resume)}
