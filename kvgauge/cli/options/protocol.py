"""Options of the command line that say how a quantized cache is run."""

import argparse
from typing import Any

from kvgauge.cli.options import common as options
from kvgauge.cli.options.eviction import add_eviction_options


def add_protocol_options(parser: argparse.ArgumentParser) -> None:
    """Adds the protocol, the tokens kept in full precision or dropped, and the steps of the text."""
    group = parser.add_argument_group("protocol (how the text goes through the quantized cache)")
    group.add_argument(
        "--protocol",
        choices=("full", "decode", "cache"),
        help="full: all keys and values are quantized, in one forward pass; decode: one pass in which each token reads "
        "what the cache would hold when it is decoded; cache: token by token through the packed cache, slow "
        "(default: full)",
    )
    group.add_argument(
        "--prefill-tokens", type=options.positive, metavar="N", help="tokens of the first step, the prompt (default: 1)"
    )
    group.add_argument(
        "--chunk-tokens", type=options.positive, metavar="N", help="tokens of each step after the prompt (default: 1)"
    )
    group.add_argument(
        "--exact-prefill",
        action=argparse.BooleanOptionalAction,
        help="attention inside the prompt uses full-precision keys and values, as in KIVI (default: as the recipe has "
        "it)",
    )
    title = "tokens kept in full precision (--protocol decode or cache; default: as the recipe has it)"
    _add_window_options(parser.add_argument_group(title))
    add_eviction_options(parser)


def _add_window_options(group: Any) -> None:
    group.add_argument(
        "--residual-tokens", type=options.positive, metavar="N", help="keep the last N tokens in full precision"
    )
    group.add_argument(
        "--block-tokens",
        type=options.positive,
        metavar="N",
        help="quantize N tokens at a time, once so many have left the window (default: one scale group)",
    )
    group.add_argument(
        "--residual-length",
        type=options.positive,
        metavar="N",
        help="KIVI's residual length, instead of the two above: keys are quantized in blocks of N tokens, values token "
        "by token once N newer ones follow",
    )
    group.add_argument(
        "--keep-smallest-norm",
        type=options.whole,
        metavar="N",
        help="keep in full precision the tokens whose key norm is among the N smallest seen so far",
    )
