"""Options of the command line for the scored targets, and for figures beside the losses."""

import argparse
from pathlib import Path

from kvgauge.cli.options import common as options

OF_TEXTS = ("bos", "stride", "resume", "site_losses", "clipping")
"""Names of options that go with losses on texts alone."""


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Adds strides, a log to go on from, and figures of single sites."""
    group = parser.add_argument_group("scoring (losses on text)")
    group.add_argument(
        "--limit", type=options.positive, metavar="N", help="evaluate the first N windows of the text (default: all)"
    )
    group.add_argument("--batch-size", type=options.positive, metavar="N", help="windows per forward pass (default: 1)")
    group.add_argument(
        "--normalization",
        choices=("targets", "gptq"),
        help="perplexity as the exponential of the mean over all predicted tokens, or as GPTQ and KVQuant compute it, "
        "over windows (default: targets)",
    )
    group.add_argument(
        "--stride",
        type=options.positive,
        metavar="N",
        help="sliding windows: each starts N tokens after the previous one, and only its last N tokens are scored "
        "(default: windows do not overlap, all tokens are scored)",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="log of scored windows: written while the evaluation runs; with the log of an interrupted run, goes on "
        "from there",
    )
    group.add_argument(
        "--site-losses",
        type=options.positive,
        metavar="N",
        help="also quantize one layer's keys or values at a time and report each loss, on the first N windows; adds "
        "two passes per layer",
    )
    group.add_argument(
        "--clipping",
        action="store_true",
        help="also report the fraction of values outside the calibrated ranges, here and in the calibration text",
    )
