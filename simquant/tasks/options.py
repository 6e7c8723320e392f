"""Options for the items of tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from simquant.tasks.errors import TaskError
from simquant.tasks.item import Format


@final
@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Number and kind of a task's items.

    Parameters
    ----------
    count_tokens : callable
        Number of tokens of a prompt in the format below, special tokens included.
    context_tokens : int
        Context length of the model, for prompt and answer together.
    format : {'plain', 'chat'}
        Form of the prompts, for tasks that have both.
    limit : int or None
        Maximum number of items of a task; None is the task's own number.
    seed : int
        Seed of items that are drawn at random.
    lengths : tuple of int or None
        Prompt lengths in tokens of synthetic tasks; None is the longest usual one that fits into the context.
    depths : tuple of float or None
        Depths of the answer in a prompt, 0 to 1; None spreads them evenly.
    data : Path or None
        Local data in place of the hub's: a file, or a folder of files.
    texts : tuple of str
        Ordinary text, for tasks that continue it.
    """

    count_tokens: Callable[[str], int]
    context_tokens: int
    format: Format = "plain"
    limit: int | None = None
    seed: int = 0
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    data: Path | None = None
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise TaskError(f"tasks: expected a limit from 1; got {self.limit}.")
        if any(length < 1 for length in self.lengths or ()) or self.lengths == ():
            raise TaskError(f"tasks: expected lengths from 1 token; got {self.lengths}.")
        if any(not 0 <= depth <= 1 for depth in self.depths or ()) or self.depths == ():
            raise TaskError(f"tasks: expected depths from 0, the start, to 1, the end; got {self.depths}.")
