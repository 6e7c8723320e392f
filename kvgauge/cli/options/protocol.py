"""Options of the command line that say how a quantized cache is run."""

import argparse
from typing import Any

from kvgauge.cli.options import common as options
from kvgauge.cli.options.eviction import add_eviction_options


def add_protocol_options(parser: argparse.ArgumentParser) -> None:
    """Adds the protocol, the tokens kept in full precision or dropped, and the steps of the text."""
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=("full", "decode", "cache"),
        help="full: every token is quantized before it is read; decode: one pass in which each query reads what a "
        "cache holds at its step; cache: step by step through the packed cache (default: full)",
    )
    _add_window_options(parser.add_argument_group("tokens that stay exact (default: what the recipe says)"))
    group.add_argument(
        "--prefill-tokens", type=options.positive, metavar="N", help="tokens of the first step (default: 1)"
    )
    group.add_argument(
        "--chunk-tokens", type=options.positive, metavar="N", help="tokens of each later step (default: 1)"
    )
    group.add_argument(
        "--exact-prefill",
        action=argparse.BooleanOptionalAction,
        help="the first step reads exact keys and values, as KIVI does (default: what the recipe says)",
    )
    add_eviction_options(parser)


def _add_window_options(group: Any) -> None:
    group.add_argument("--residual-tokens", type=options.positive, metavar="N", help="recent tokens that stay exact")
    group.add_argument(
        "--block-tokens",
        type=options.positive,
        metavar="N",
        help="tokens that are encoded at once (default, where windows are given: the fewest that fill a group)",
    )
    group.add_argument(
        "--residual-length",
        type=options.positive,
        metavar="N",
        help="as KIVI has it: keys are encoded in blocks of N once a step has read them, values one by one behind the "
        "last N",
    )
    group.add_argument(
        "--keep-smallest-norm",
        type=options.whole,
        metavar="N",
        help="tokens whose key is among the N smallest so far stay exact",
    )
