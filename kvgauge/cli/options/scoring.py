"""Options of the command line for the scored targets, and for figures beside the losses."""

import argparse
from pathlib import Path

from kvgauge.cli.options import common as options

OF_TEXTS = ("bos", "stride", "resume", "site_losses", "clipping")
"""Names of options that go with losses on texts alone."""


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Adds strides, a log to go on from, and figures of single sites."""
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
