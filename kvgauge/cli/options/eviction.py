"""Options of the command line that say which tokens a cache drops, under the names of SCOPE and KIVI-SCOPE."""

import argparse
from typing import TYPE_CHECKING

from kvgauge.cli.options import common as options
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from simquant import Eviction

EVICTION_OPTIONS = (
    "method",
    "max_capacity_prompt",
    "window_size",
    "pooling",
    "kernel_size",
    "decoding_metric",
    "decoding_window_size",
    "decoding_recent_size",
    "delta",
)
"""Names of the options in the parsed arguments."""


def add_eviction_options(parser: argparse.ArgumentParser) -> None:
    """A strategy and a budget for the prompt, and a strategy and a budget for what is decoded after it."""
    group = parser.add_argument_group(
        "eviction, under the names of SCOPE (--protocol cache)",
        "The prompt is the first step: --prefill-tokens. Budgets are tokens of each sequence and layer.",
    )
    group.add_argument("--method", metavar="NAME", help="ALLKV, SnapKV, PyramidKV, H2O or StreamingLLM")
    group.add_argument(
        *("--max-capacity-prompt", "--max-capacity-prompts", "--prefill-window-size"),
        type=options.positive,
        metavar="N",
        help="tokens that stay of the prompt (default: 2048)",
    )
    group.add_argument(
        *("--window-size", "--prefill-recent-size"),
        type=options.positive,
        metavar="N",
        help="how many of them are its last, whose queries decide (default: 32)",
    )
    group.add_argument("--pooling", metavar="NAME", help="avgpool or maxpool (default: avgpool)")
    group.add_argument(
        "--kernel-size", type=options.positive, metavar="N", help="neighbours that share scores (default: 5)"
    )
    group.add_argument("--decoding-metric", metavar="NAME", help="slide, adaptive, discontinuous, h2o or None")
    group.add_argument(
        "--decoding-window-size",
        type=options.positive,
        metavar="N",
        help="decoded tokens that stay (default: 1024)",
    )
    group.add_argument(
        "--decoding-recent-size",
        type=options.positive,
        metavar="N",
        help="how many of them are the last (default: 256)",
    )
    group.add_argument(
        "--delta",
        type=options.positive,
        metavar="N",
        help="decoded tokens from one widening to the next (default: 15)",
    )


def eviction_of(args: argparse.Namespace) -> "Eviction | None":
    """The eviction that is asked for; None where none is.

    Raises
    ------
    UsageError
        If it is asked for under another protocol than 'cache', or would never drop anything, or is none.
    """
    given = {name: getattr(args, name) for name in EVICTION_OPTIONS if getattr(args, name) is not None}
    if not given:
        return None
    flags = ", ".join(f"--{name}".replace("_", "-") for name in given)
    if args.protocol != "cache":
        raise UsageError(f"{flags}: only a cache drops tokens, step by step; add --protocol cache")
    from simquant import from_scope_options

    try:
        eviction = from_scope_options(**given)
    except ValueError as error:
        raise UsageError(f"{flags}: {error}") from error
    if eviction.prefill == "all" and eviction.decoding is None:
        raise UsageError(f"{flags}: nothing is dropped; add --decoding-metric, or a --method other than ALLKV")
    tasks = vars(args).get("tasks")  # whose prompts are one step each, of any length
    if eviction.prefill != "all" and not tasks and (args.prefill_tokens or 1) <= eviction.prefill_tokens:
        raise UsageError(
            f"{flags}: the prompt, which is the first step, has {args.prefill_tokens or 1} tokens and "
            f"{eviction.prefill_tokens} may stay; use more --prefill-tokens or a smaller --max-capacity-prompt"
        )
    return eviction
