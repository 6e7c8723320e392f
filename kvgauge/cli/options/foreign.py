"""Options of the command line about files of other tools."""

import argparse
from typing import Any

from kvgauge.cli.options.common import BITS, FRACTION_HELP


def add_foreign_options(parser: argparse.ArgumentParser) -> None:
    """Adds the properties that a file of another tool does not record."""
    group = parser.add_argument_group("files of other tools (they do not record the following)")
    group.add_argument("--abits", "--bits", type=int, choices=BITS[:-1], metavar="N", help="bits of the codes")
    group.add_argument(
        "--nuq",
        action=argparse.BooleanOptionalAction,
        help="the file holds codebooks; --no-nuq: it holds uniform grids (default: whichever is found)",
    )
    add_normal_float(group)
    group.add_argument(
        "--include-sparse",
        action=argparse.BooleanOptionalAction,
        help="the ranges were fitted without outliers, which stay in 16 bits",
    )
    group.add_argument("--sparsity-threshold", type=float, metavar="FRACTION", help=FRACTION_HELP)
    group.add_argument(
        "--first-few-fp16", type=int, metavar="N", help="first tokens (attention sinks) kept in 16 bits (default: 0)"
    )


def add_normal_float(parser: Any) -> None:
    """Adds the one option that only files of other tools need."""
    parser.add_argument(
        "--nf", action="store_true", help="a KVQuant file without codebooks was made with NormalFloat levels (nf4, nf3)"
    )
