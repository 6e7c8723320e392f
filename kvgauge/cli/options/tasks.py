"""Options of the command line for tasks."""

import argparse
from pathlib import Path

from kvgauge.cli.options import common as options


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Adds tasks, their items, and the file of answers."""
    group = parser.add_argument_group("tasks (answers come through the packed cache, whatever the protocol)")
    group.add_argument(
        "--tasks",
        metavar="NAMES",
        help="perplexity, passkey, needle, synthetic (multi_key, multi_value, variables, common_words), gsm8k, drift, "
        "longbench, longbench-e, longbench:hotpotqa, ..., with commas between (default: perplexity)",
    )
    group.add_argument("--task-limit", type=options.positive, metavar="N", help="items of a task at most")
    group.add_argument(
        "--task-data", type=Path, metavar="FILE|FOLDER", help="local .jsonl data: one task's file, or TASK.jsonl in it"
    )
    group.add_argument(
        "--task-prompts", type=Path, metavar="FILE", help="other templates for LongBench, by data set (.yaml or .json)"
    )
    group.add_argument(
        "--task-lengths", type=_lengths, metavar="N,N", help="tokens of a prompt; for the demo model words of filler"
    )
    group.add_argument(
        "--task-depths", type=_depths, metavar="X,X", help="where passkey and needle stand, 0 first to 1 last"
    )
    group.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write answers there, and go on where an earlier run stopped"
    )
    group.add_argument("--score", type=Path, metavar="FILE", help="only score answers: no model is needed")


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(options.positive(word.strip()) for word in text.split(","))


def _depths(text: str) -> tuple[float, ...]:
    try:
        depths = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 1, got {text!r}") from error
    if not all(0 <= depth <= 1 for depth in depths):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 1, got {text!r}")
    return depths
