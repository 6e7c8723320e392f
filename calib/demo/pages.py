"""The demo text: pages that follow from a seed, one stream to learn from and one that is held out."""

import math
from collections.abc import Callable
from typing import Literal

from calib.demo.draws import Draws
from calib.demo.stories import facts, story
from calib.demo.tasks import TASKS, Task

Split = Literal["training", "held-out"]

_LONGEST_WORDS = 880
"""Words of the longest text around a task: a word or a sign is about a token."""

_TEXT_PAGES: dict[Split, int] = {"training": 400, "held-out": 200}


def page(split: Split, index: int, longest_words: int = _LONGEST_WORDS) -> str:
    """Page `index` of a stream; short pages are as likely as long ones by the logarithm of their length.

    Parameters
    ----------
    split : {'training', 'held-out'}
        Which stream.
    index : int
        Number of the page, from 0.
    longest_words : int
        Words of text around a task, at most.
    """
    draws = Draws(f"{split} {index}")
    write = draws.pick(_MIX)
    n_words = int(math.exp(draws.below(1000) / 1000 * math.log(longest_words)))
    return write(draws, n_words)


def demo_text(split: Split) -> str:
    """The first pages of a stream as one text: to calibrate on, or to evaluate with."""
    return "\n\n".join(page(split, index) for index in range(_TEXT_PAGES[split]))


def drill(index: int) -> str:
    """A task and nothing else, asked several times: from such pages a model learns first to look back."""
    draws = Draws(f"drill {index}")
    return TASKS[draws.pick(_DRILLED)](draws, 0, 4).text


def _stories(draws: Draws, n_words: int) -> str:
    told = [story(draws)]
    while sum(len(text) for text in told) < 6 * n_words:
        told.append(story(draws))
    return "\n".join(told)


def _quiz(task: Task) -> Callable[[Draws, int], str]:
    def write(draws: Draws, n_words: int) -> str:
        return task(draws, n_words, draws.between(1, 3)).text

    return write


_DRILLED = (
    *("copying", "copying", "copying", "passkey", "multi_key", "multi_key"),
    *("multi_value", "multi_value", "variables", "variables", "arithmetic"),
)

_MIX: tuple[Callable[[Draws, int], str], ...] = (
    *[_stories] * 6,
    facts,
    *(_quiz(task) for task in TASKS.values()),
    *(_quiz(TASKS[task]) for task in ("passkey", "multi_key", "variables", "copying", "copying")),
)
"""What a page may be; how often something stands here is how likely it is."""
