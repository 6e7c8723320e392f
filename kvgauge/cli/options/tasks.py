"""Options of the command line that say which tasks a model is asked."""

import argparse
import difflib
from pathlib import Path

from kvgauge.cli.options import common as options
from kvgauge.terminal.console import UsageError

PERPLEXITY = "perplexity"


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Tasks, their items, and the file of answers."""
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


def task_names(args: argparse.Namespace) -> tuple[str, ...]:
    """The tasks that are asked for, groups of them resolved; without the option perplexity alone, or
    none where the harness has its own.

    Raises
    ------
    UsageError
        If one of them is unknown, with the nearest; or options of tasks are given without tasks.
    """
    from simquant.tasks import GROUPS, TASKS
    from simquant.tasks.longbench.tasks import longbench_group

    if args.tasks is None:
        options.refuse_given(args, _OF_TASKS, "no task is asked for; add --tasks")
        return () if args.lm_eval is not None else (PERPLEXITY,)
    found: list[str] = []
    longbench = ("longbench", "longbench-e")
    for name in (word.strip() for word in args.tasks.split(",")):
        if name in longbench:
            found += longbench_group(name, args.task_data)
        elif name in (PERPLEXITY, *TASKS, *GROUPS):
            found += GROUPS.get(name, (name,))
        else:
            close = difflib.get_close_matches(name, (PERPLEXITY, *GROUPS, *longbench, *TASKS), n=1)
            short = [known for known in (PERPLEXITY, *TASKS, *GROUPS, *longbench) if ":" not in known]
            raise UsageError(
                f"--tasks: expected names out of {', '.join(short)}, longbench:DATASET; got {name!r}"
                + (f"; did you mean {close[0]}?" if close else "")
            )
    if set(found) == {PERPLEXITY}:
        options.refuse_given(args, _OF_TASKS, "perplexity has no items; add a task to --tasks")
    return tuple(dict.fromkeys(found))


_OF_TASKS = ("task_limit", "task_data", "task_prompts", "task_lengths", "task_depths", "predictions")


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
