"""Options of the command line that say how a quantized cache is run."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scripts import options
from scripts.console import UsageError

if TYPE_CHECKING:
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site

_OF_STEPS = ("residual_tokens", "prefill_tokens", "chunk_tokens", "exact_prefill")


def add_protocol_options(parser: argparse.ArgumentParser) -> None:
    """The protocol, the window of exact tokens, and how the text enters the cache."""
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=("full", "decode", "cache"),
        default="full",
        help="full: every token is quantized before it is read; decode: one pass in which each query reads what a "
        "cache holds at its step; cache: step by step through the packed cache (default: full)",
    )
    group.add_argument(
        "--residual-tokens", type=options.positive, metavar="N", help="recent tokens that stay exact (default: none)"
    )
    group.add_argument(
        "--prefill-tokens", type=options.positive, metavar="N", help="tokens of the first step (default: 1)"
    )
    group.add_argument(
        "--chunk-tokens", type=options.positive, metavar="N", help="tokens of each later step (default: 1)"
    )
    group.add_argument(
        "--exact-prefill",
        action="store_true",
        default=None,
        help="the first step reads exact keys and values, as KIVI does",
    )


def protocol_settings(
    args: argparse.Namespace, quantizers: "Mapping[Site, Quantizer]", sink_tokens: int
) -> dict[str, Any]:
    """What `simquant.evaluate` is told; tokens leave the window in the smallest blocks that are whole groups.

    Raises
    ------
    UsageError
        If windows or steps are asked for under the protocol 'full', which has none.
    """
    from simquant import CachePolicy, Steps
    from simquant.cacheable import group_tokens

    given = [name for name in _OF_STEPS if getattr(args, name) is not None]
    if args.protocol == "full" and given:
        flags = ", ".join(f"--{name}".replace("_", "-") for name in given)
        raise UsageError(f"{flags}: the protocol 'full' has no window and no steps; add --protocol decode or cache")
    if args.protocol == "full":
        return {"policy": CachePolicy(sink_tokens=sink_tokens)}
    policy = CachePolicy(
        sink_tokens=sink_tokens,
        residual_tokens=args.residual_tokens or 0,
        block_tokens=group_tokens(quantizers),
        exact_prefill=bool(args.exact_prefill),
    )
    steps = Steps(prefill_tokens=args.prefill_tokens or 1, chunk_tokens=args.chunk_tokens or 1)
    return {"policy": policy, "protocol": args.protocol, "steps": steps}
