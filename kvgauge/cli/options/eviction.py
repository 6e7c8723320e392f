"""Options of the command line that say which tokens a cache drops, under the names of SCOPE and KIVI-SCOPE."""

import argparse
from typing import Any

from kvgauge.cli.options import common as options


def add_eviction_options(parser: argparse.ArgumentParser) -> None:
    """Adds a strategy and a budget for the prompt, and the same for the decoded tokens."""
    group = parser.add_argument_group(
        "eviction (--protocol cache), with the option names of SCOPE",
        "Drops tokens from the cache. The prompt is the first step: set its length with --prefill-tokens. Budgets "
        "count tokens per sequence and layer.",
    )
    group.add_argument(
        "--method", metavar="NAME", help="eviction of the prompt: ALLKV (none), SnapKV, PyramidKV, H2O or StreamingLLM"
    )
    group.add_argument(
        *("--max-capacity-prompt", "--max-capacity-prompts", "--prefill-window-size"),
        type=options.positive,
        metavar="N",
        help="prompt tokens to keep (default: 2048)",
    )
    group.add_argument(
        *("--window-size", "--prefill-recent-size"),
        type=options.positive,
        metavar="N",
        help="observation window: the last N prompt tokens, always kept, used for scoring (default: 32)",
    )
    group.add_argument(
        "--pooling",
        metavar="NAME",
        help="smoothing of scores over neighbouring tokens: avgpool or maxpool (default: avgpool)",
    )
    group.add_argument(
        "--kernel-size", type=options.positive, metavar="N", help="tokens in a smoothing window (default: 5)"
    )
    _add_decoding_options(group)


def _add_decoding_options(group: Any) -> None:
    group.add_argument(
        "--decoding-metric",
        metavar="NAME",
        help="eviction of decoded tokens: slide, adaptive, discontinuous, h2o or None (default: None, all are kept)",
    )
    group.add_argument(
        "--decoding-window-size",
        type=options.positive,
        metavar="N",
        help="decoded tokens to keep (default: 1024)",
    )
    group.add_argument(
        "--decoding-recent-size",
        type=options.positive,
        metavar="N",
        help="most recent decoded tokens, always kept (default: 256)",
    )
    group.add_argument(
        "--delta",
        type=options.positive,
        metavar="N",
        help="adaptive and discontinuous: the budget grows by one token every N decoded tokens (default: 15)",
    )
