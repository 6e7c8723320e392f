"""Options of the command line about files of other tools."""

import argparse
from typing import Any

from kvgauge.cli.options.common import BITS


def add_foreign_options(parser: argparse.ArgumentParser) -> None:
    """Adds the properties that a file of another tool does not record."""
    group = parser.add_argument_group("what a file of another tool does not say")
    group.add_argument("--abits", "--bits", type=int, choices=BITS[:-1], metavar="N", help="bits of its codes")
    group.add_argument("--nuq", action=argparse.BooleanOptionalAction, help="it must hold codebooks")
    add_normal_float(group)
    group.add_argument("--include-sparse", action=argparse.BooleanOptionalAction, help="its ranges leave outliers out")
    group.add_argument("--sparsity-threshold", type=float, metavar="SHARE", help="share kept dense (default: 0.99)")
    group.add_argument("--first-few-fp16", type=int, metavar="N", help="first tokens kept exact (default: 0)")


def add_normal_float(parser: Any) -> None:
    """Adds the one option that only files of other tools need."""
    parser.add_argument("--nf", action="store_true", help="ranges of a KVQuant file stand for NormalFloat levels")
