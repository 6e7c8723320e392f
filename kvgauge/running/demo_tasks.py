"""The demo model's versions of tasks: in the words that it was trained on, scored like those of other models."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from calib.demo import tasks as demo
from calib.demo.draws import Draws
from simquant.tasks import TASKS, Item, Prediction, Task, TaskOptions
from simquant.tasks.synthetic.grid import DEPTHS, Place, places

_WORDS = (800,)
"""Words around what has to be found: what leaves room for several numbers in the context. A word is about a token."""


@final
@dataclass(frozen=True, kw_only=True)
class DemoTask(Task):
    """A task with the demo model's own items.

    Parameters
    ----------
    name, metric : str
        See `Task`.
    scorer : Task
        Scores answers.
    draw : callable
        A trial from draws, words of other text, questions, and where the task has one a depth.
    has_depth : bool
        Whether it has one.
    """

    name: str
    metric: str
    scorer: Task
    draw: Callable[..., demo.Trial]
    has_depth: bool

    def items(self, options: TaskOptions) -> Sequence[Item]:
        """A trial for each length and depth in turn; lengths are words of other text."""
        depths = (options.depths or DEPTHS) if self.has_depth else (None,)
        return [
            self._item(options, place)
            for place in places(options.lengths or _WORDS, depths, options.limit or self.n_items)
        ]

    def score(self, text: str, item: Item | Prediction) -> float:
        """As for other models."""
        return self.scorer.score(text, item)

    def _item(self, options: TaskOptions, place: Place) -> Item:
        at: dict[str, Any] = {} if place.depth is None else {"depth": place.depth}
        trial = self.draw(Draws(f"task {self.name} {options.seed} {place.id}"), place.length, 1, **at)
        return Item(
            task=self.name,
            id=place.id,
            prompt=trial.prompt,
            references=tuple(re.findall(r"\d+", trial.answer)) or (trial.answer.strip(" ."),),
            cell=place.cell("words"),
            max_new_tokens=options.count_tokens(trial.answer),
        )


def demo_tasks() -> Mapping[str, Task]:
    """All tasks, those among them that the demo model knows in its own words."""
    with_depth = {"passkey": demo.passkey, "needle": demo.needle}
    without = {name: demo.TASKS[name] for name in ("multi_key", "multi_value", "variables", "common_words")}
    own = {
        name: DemoTask(
            name=name, metric=TASKS[name].metric, scorer=TASKS[name], draw=draw, has_depth=name in with_depth
        )
        for name, draw in {**with_depth, **without}.items()
    }
    return {**TASKS, **own}
