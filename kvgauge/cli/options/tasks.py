"""Options of the command line for tasks."""

import argparse
from pathlib import Path

from kvgauge.cli.options import common as options


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Adds tasks, their items, and the file of answers."""
    group = parser.add_argument_group("tasks (answers are generated on the packed cache, whatever --protocol says)")
    group.add_argument(
        "--tasks",
        metavar="A,B,...",
        help="perplexity, passkey, needle, synthetic (multi_key, multi_value, variables, common_words), gsm8k, drift, "
        "longbench, longbench-e or one data set as longbench:hotpotqa (default: perplexity)",
    )
    group.add_argument("--task-limit", type=options.positive, metavar="N", help="ask at most N items of each task")
    group.add_argument(
        "--task-data",
        type=Path,
        metavar="FILE|FOLDER",
        help="local data: the .jsonl file of one task, or a folder with TASK.jsonl files",
    )
    group.add_argument(
        "--task-prompts", type=Path, metavar="FILE", help="prompt templates for LongBench by data set, .yaml or .json"
    )
    group.add_argument(
        "--task-lengths",
        type=_lengths,
        metavar="N,N,...",
        help="prompt lengths of passkey, needle, synthetic and drift, in tokens (demo model: words of filler text)",
    )
    group.add_argument(
        "--task-format",
        choices=("plain", "chat"),
        help="form of prompts: text to go on with, or, for an instruct model, a user's turn of its chat template; "
        "lengths count the template, too (default: plain)",
    )
    group.add_argument(
        "--task-depths",
        type=_depths,
        metavar="X,X,...",
        help="positions of the fact in passkey and needle, from 0 (start of the prompt) to 1 (end)",
    )
    group.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="write the answers to FILE; an interrupted run goes on from it",
    )
    group.add_argument(
        "--score", type=Path, metavar="FILE", help="score the answers in FILE and stop; no model is loaded"
    )


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
