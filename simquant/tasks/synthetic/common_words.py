"""Common-words task: name the most frequent words of a list."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import ClassVar, final

from simquant.tasks.answers import found_share
from simquant.tasks.item import Item
from simquant.tasks.options import TaskOptions
from simquant.tasks.prediction import Prediction
from simquant.tasks.synthetic.grid import Place, places
from simquant.tasks.synthetic.lengths import lengths_of, longest_fit
from simquant.tasks.synthetic.puzzles import sample
from simquant.tasks.synthetic.wording import answer_limits, worded
from simquant.tasks.synthetic.words import THINGS
from simquant.tasks.task import Task

_COMMON = 3
_RARE = 2
"""Numbers of common and of other words among every five words of the list."""
_LEAST = 10
"""Minimum words of a list: in shorter ones other words may be as frequent."""
_OPENING = "Below is a list of words, some of which come again and again."
_QUESTION = f"Which {_COMMON} words are the most common in the list?"
_BEGINNING = "The words are"


@final
@dataclass(frozen=True, kw_only=True)
class CommonWords(Task):
    """Task of naming the most frequent words of a list.

    References
    ----------
    arXiv 2404.06654, section 3, for the idea; wording and sizes are ours.
    """

    name: str = "common_words"
    metric: str = "share of the common words that the answer names"
    max_new_tokens: ClassVar[int] = 16

    def items(self, options: TaskOptions) -> Sequence[Item]:
        """Items, with a list of each length in turn."""
        lengths = lengths_of(self.name, options, answer_limits(self.max_new_tokens, options)[0])
        return [self._item(options, place) for place in places(lengths, (None,), options.limit or self.n_items)]

    def score(self, text: str, item: Item | Prediction) -> float:
        """Share of the frequent words that the answer names."""
        return found_share(text, item.references)

    def _item(self, options: TaskOptions, place: Place) -> Item:
        seed = f"{self.name} {options.seed} {place.id}"
        words = sample(Random(seed), THINGS, len(THINGS))
        write = partial(_prompt, words, seed, options)
        max_new_tokens, stop = answer_limits(self.max_new_tokens, options)
        return Item(
            task=self.name,
            id=place.id,
            prompt=longest_fit(write, place.length, options, self.name),
            references=tuple(words[:_COMMON]),
            cell=place.cell("length"),
            max_new_tokens=max_new_tokens,
            stop=stop,
            format=options.format,
        )


def _prompt(words: Sequence[str], seed: str, options: TaskOptions, n_more: int) -> str:
    """Prompt with a list in which the first words of `words` are the frequent ones."""
    draw, common, rare = Random(f"list {seed}"), words[:_COMMON], words[_COMMON:]
    listed: list[str] = []
    while len(listed) < _LEAST + n_more:
        # Rare words take turns, two in every five words, so that none becomes as frequent as a common one.
        first = _RARE * len(listed) // (_COMMON + _RARE)
        others = [rare[(first + i) % len(rare)] for i in range(_RARE)]
        listed += sample(draw, [*common, *others], _COMMON + _RARE)
    text = f"Words: {' '.join(listed[: _LEAST + n_more])}"
    return worded(_OPENING, text, _QUESTION, _BEGINNING, options)
