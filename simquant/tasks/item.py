"""A question to a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

CellValue = str | int | float


@final
@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt, what is expected after it, and where the answer ends.

    Parameters
    ----------
    task : str
        The name under which the answer is scored; a key of `TASKS`.
    id : str
        Unique within the task, and the same for the same prompt in every run.
    prompt : str
        What the model reads.
    references : tuple of str
        Right answers, or parts of the right answer: the task says which. Empty where the exact model is the reference.
    choices : tuple of str
        The answers that were offered, where there were.
    cell : mapping
        Where the item stands in a table of results, such as `{"length": 512, "depth": 0.5}`.
    max_new_tokens : int
        The answer ends after so many tokens.
    stop : tuple of str
        The answer ends before the first of these.
    overlong : {'refuse', 'cut_middle'}
        What is done with a prompt that does not fit into the context together with the answer.
    """

    task: str
    id: str
    prompt: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    cell: Mapping[str, CellValue] = field(default_factory=dict)
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    overlong: Literal["refuse", "cut_middle"] = "refuse"

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1 or not all(self.stop):
            raise ValueError(
                f"{self.task} {self.id}: expected a prompt, at least 1 new token, and no empty stop string; got "
                f"{len(self.prompt)} characters, {self.max_new_tokens} tokens, stop {self.stop}"
            )
