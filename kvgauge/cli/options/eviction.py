"""Options of the command line that say which tokens a cache drops, under the names of SCOPE and KIVI-SCOPE."""

import argparse

from kvgauge.cli.options import common as options


def add_eviction_options(parser: argparse.ArgumentParser) -> None:
    """Adds a strategy and a budget for the prompt, and the same for the decoded tokens."""
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
