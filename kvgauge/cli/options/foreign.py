"""Options of the command line about files of other tools."""

import argparse
from typing import TYPE_CHECKING, Any

from kvgauge.cli.options.common import BITS
from kvgauge.cli.options.recipe import outlier_entry

if TYPE_CHECKING:
    from artifacts.importers import Hints


def add_foreign_options(parser: argparse.ArgumentParser) -> None:
    """What a file of another tool does not say."""
    group = parser.add_argument_group("what a file of another tool does not say")
    group.add_argument("--abits", "--bits", type=int, choices=BITS[:-1], metavar="N", help="bits of its codes")
    group.add_argument("--nuq", action=argparse.BooleanOptionalAction, default=None, help="it must hold codebooks")
    add_normal_float(group)
    group.add_argument(
        "--include-sparse", action=argparse.BooleanOptionalAction, default=None, help="its ranges leave outliers out"
    )
    group.add_argument("--sparsity-threshold", type=float, metavar="SHARE", help="share kept dense (default: 0.99)")
    group.add_argument("--first-few-fp16", type=int, metavar="N", help="first tokens kept exact (default: 0)")


def add_normal_float(parser: Any) -> None:
    """Only other tools' files need this one."""
    parser.add_argument("--nf", action="store_true", help="ranges of a KVQuant file stand for NormalFloat levels")


def foreign_hints(args: argparse.Namespace) -> "Hints":
    """What the command line says of a file of another tool."""
    from artifacts.importers import Hints

    sparse = outlier_entry(args, {}) if args.include_sparse is not None or args.sparsity_threshold is not None else None
    return Hints(
        bits=args.abits,
        codebooks=args.nuq if not args.nf else None,
        normal_float=args.nf,
        outlier_fraction=sparse["fraction"] if sparse else None,
        sink_tokens=max(0, args.first_few_fp16 or 0),
    )
