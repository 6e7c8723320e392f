"""What a user can choose about the items of a task."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from simquant.tasks.errors import TaskError


@final
@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which items, and how many.

    Parameters
    ----------
    count_tokens : callable
        How many tokens a text has, those included that the tokenizer adds by itself.
    context_tokens : int
        What the model can read, prompt and answer together.
    limit : int or None
        Items of a task at most; None is the task's own number.
    seed : int
        Items that are drawn follow from it.
    lengths : tuple of int or None
        Tokens of the prompts of tasks that make their own; None is what fits into the context.
    depths : tuple of float or None
        Where in a prompt the answer stands, 0 to 1; None is spread evenly.
    data : Path or None
        Local data in place of the hub's: a file, or a folder of them.
    texts : tuple of str
        Ordinary text, for tasks that let a model go on with it.
    """

    count_tokens: Callable[[str], int]
    context_tokens: int
    limit: int | None = None
    seed: int = 0
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    data: Path | None = None
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise TaskError(f"tasks: expected a limit from 1; got {self.limit}")
        if any(length < 1 for length in self.lengths or ()) or self.lengths == ():
            raise TaskError(f"tasks: expected lengths from 1 token; got {self.lengths}")
        if any(not 0 <= depth <= 1 for depth in self.depths or ()) or self.depths == ():
            raise TaskError(f"tasks: expected depths from 0, the start, to 1, the end; got {self.depths}")
