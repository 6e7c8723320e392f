"""Item of a task: a prompt with references and limits of the answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from artifacts.errors import InvalidValueError

CellValue = str | int | float

Format = Literal["plain", "chat"]
"""Form of a prompt: text to go on with, or a turn of a conversation."""


@final
@dataclass(frozen=True, kw_only=True)
class Item:
    """Prompt with its references, and the limits of the answer.

    Parameters
    ----------
    task : str
        Name of the task that scores the answer; a key of `TASKS`.
    id : str
        Identifier, unique within the task, and the same for the same prompt in every run.
    prompt : str
        Text of the prompt; in a conversation, of the user's turn.
    format : {'plain', 'chat'}
        Form in which the model reads the prompt, see `prompt_text`.
    references : tuple of str
        Right answers, or parts of the right answer, depending on the task. Empty if the answer in full precision is the
        reference.
    choices : tuple of str
        Answers offered in the prompt, if any.
    cell : mapping
        Cell of the item in a table of results, such as `{"length": 512, "depth": 0.5}`.
    max_new_tokens : int
        Maximum number of tokens of the answer.
    stop : tuple of str
        Stop strings: the answer ends before the first of them.
    overlong : {'refuse', 'cut_middle'}
        Treatment of a prompt that does not fit into the context together with the answer: raise, or cut its middle.
    """

    task: str
    id: str
    prompt: str
    format: Format = "plain"
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    cell: Mapping[str, CellValue] = field(default_factory=dict)
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    overlong: Literal["refuse", "cut_middle"] = "refuse"

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1 or not all(self.stop):
            raise InvalidValueError(
                f"{self.task} {self.id}: expected a prompt, at least 1 new token, and no empty stop string; got "
                f"{len(self.prompt)} characters, {self.max_new_tokens} tokens, stop {self.stop}. Correct the item"
            )
