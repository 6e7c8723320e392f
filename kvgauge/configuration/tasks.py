"""The tasks of an evaluation."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvgauge.configuration.fields import refuse_given
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from simquant.tasks.item import Format

PERPLEXITY = "perplexity"

_OF_TASKS = ("task_limit", "task_data", "task_prompts", "task_lengths", "task_depths", "task_format", "predictions")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Tasks, their items, and the file of answers.

    Parameters
    ----------
    tasks : str or None
        Names of tasks and groups, with commas between; None where none was named.
    task_limit : int or None
        Items of a task at most.
    task_data : Path or None
        Local data: the file of one task, or a folder of them.
    task_prompts : Path or None
        Other templates for LongBench.
    task_lengths : tuple of int or None
        Tokens of a prompt; for the demo model words of other text.
    task_depths : tuple of float or None
        Places of what has to be found, from 0 to 1.
    task_format : {'plain', 'chat'} or None
        How prompts are put; None is plain.
    predictions : Path or None
        File of answers to write, and to go on from.
    score : Path or None
        File of answers to score without a model.
    """

    tasks: str | None = None
    task_limit: int | None = None
    task_data: Path | None = None
    task_prompts: Path | None = None
    task_lengths: tuple[int, ...] | None = None
    task_depths: tuple[float, ...] | None = None
    task_format: "Format | None" = None
    predictions: Path | None = None
    score: Path | None = None


def task_names(config: TaskConfig, *, harness: bool = False) -> tuple[str, ...]:
    """The tasks that are asked for, with groups resolved; where none are, perplexity.

    Parameters
    ----------
    config : TaskConfig
        With `tasks`.
    harness : bool
        The harness has tasks of its own, so that none are asked for where none are named.

    Raises
    ------
    UsageError
        If one of them is unknown, with the nearest; or options of tasks are given without tasks.
    """
    if config.tasks is None:
        refuse_given(config, _OF_TASKS, "no effect without a task; add --tasks")
        return () if harness else (PERPLEXITY,)
    found = [task for name in config.tasks.split(",") for task in _resolved(name.strip(), config.task_data)]
    if set(found) == {PERPLEXITY}:
        refuse_given(config, _OF_TASKS, "no effect on perplexity; add another task to --tasks")
    return tuple(dict.fromkeys(found))


def _resolved(name: str, data: Path | None) -> tuple[str, ...]:
    """A task, or those of a group."""
    from simquant.tasks import GROUPS, TASKS
    from simquant.tasks.longbench.tasks import longbench_group

    longbench = ("longbench", "longbench-e")
    if name in longbench:
        return tuple(longbench_group(name, data))
    if name in (PERPLEXITY, *TASKS, *GROUPS):
        return tuple(GROUPS.get(name, (name,)))
    close = difflib.get_close_matches(name, (PERPLEXITY, *GROUPS, *longbench, *TASKS), n=1)
    short = [known for known in (PERPLEXITY, *TASKS, *GROUPS, *longbench) if ":" not in known]
    raise UsageError(
        f"--tasks: unknown task {name!r}; known: {', '.join(short)}, longbench:DATASET"
        + (f". Did you mean {close[0]}?" if close else "")
    )
