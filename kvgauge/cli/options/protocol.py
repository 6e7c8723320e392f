"""Options of the command line that say how a quantized cache is run."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvgauge.cli.options import common as options
from kvgauge.cli.options.eviction import EVICTION_OPTIONS, add_eviction_options, eviction_of
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site

_OF_STEPS = (
    "residual_tokens",
    "block_tokens",
    "residual_length",
    "keep_smallest_norm",
    "prefill_tokens",
    "chunk_tokens",
    "exact_prefill",
)


def add_protocol_options(parser: argparse.ArgumentParser) -> None:
    """The protocol, the tokens that stay exact or are dropped, and how the text enters the cache."""
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=("full", "decode", "cache"),
        default="full",
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
        default=None,
        help="the first step reads exact keys and values, as KIVI does (default: what the recipe says)",
    )
    add_eviction_options(parser)


def protocol_settings(
    args: argparse.Namespace,
    quantizers: "Mapping[Site, Quantizer]",
    sink_tokens: int,
    cache: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `simquant.evaluate` is told.

    Parameters
    ----------
    args : argparse.Namespace
        With some of the options above.
    quantizers : Artifact or mapping from Site to Quantizer
        An artifact's recipe says which tokens stay exact where no flag does.
    sink_tokens : int
        First tokens that stay exact.
    cache : mapping or None
        What a recipe says under `cache`, for quantizers without an artifact.

    Raises
    ------
    UsageError
        If windows, steps or eviction are asked for under a protocol that has none, or two windows.
    """
    from simquant import CachePolicy, Chunking
    from simquant.policy.checks import default_policy

    args = argparse.Namespace(**dict.fromkeys((*_OF_STEPS, *EVICTION_OPTIONS)) | vars(args))
    given = [name for name in _OF_STEPS if getattr(args, name) is not None]
    if args.protocol == "full" and given:
        flags = ", ".join(f"--{name}".replace("_", "-") for name in given)
        raise UsageError(f"{flags}: the protocol 'full' has no window and no steps; add --protocol decode or cache")
    eviction = eviction_of(args)
    if args.protocol == "full":
        return {"policy": CachePolicy(sink_tokens=sink_tokens)}
    changes = _window(args, quantizers)
    for name in ("exact_prefill", "keep_smallest_norm"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    policy = replace(default_policy(quantizers, entry=cache), sink_tokens=sink_tokens, eviction=eviction, **changes)
    chunking = Chunking(prefill_tokens=args.prefill_tokens or 1, chunk_tokens=args.chunk_tokens or 1)
    return {"policy": policy, "protocol": args.protocol, "chunking": chunking}


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


def _window(args: argparse.Namespace, quantizers: "Mapping[Site, Quantizer]") -> dict[str, Any]:
    """The windows that are asked for, which replace those of the recipe; nothing where none are."""
    from simquant.policy.checks import group_tokens
    from simquant.policy.policy import ResidualWindow

    if args.residual_length is not None:
        if args.residual_tokens is not None or args.block_tokens is not None:
            raise UsageError("--residual-length stands for both windows; drop --residual-tokens and --block-tokens")
        values = ResidualWindow(residual_tokens=args.residual_length + 1)
        return {"residual_tokens": 1, "block_tokens": args.residual_length, "values": values}
    if args.residual_tokens is None and args.block_tokens is None:
        return {}
    block_tokens = args.block_tokens or group_tokens(quantizers)
    return {"residual_tokens": args.residual_tokens or 0, "block_tokens": block_tokens, "values": None}
