"""Demo text: pages generated from a seed, in a training and a held-out split."""

import math
from collections.abc import Callable
from typing import Literal

from calib.demo.draws import Draws
from calib.demo.stories import facts, story
from calib.demo.tasks import TASKS, Task

Split = Literal["training", "held-out"]

_LONGEST_WORDS = 880
"""Maximum words of filler text around a task; a word or a sign is about a token."""

_TEXT_PAGES: dict[Split, int] = {"training": 400, "held-out": 200}


def page(split: Split, index: int, longest_words: int = _LONGEST_WORDS) -> str:
    """Page of a split; the logarithm of page lengths is uniformly distributed.

    Parameters
    ----------
    split : {'training', 'held-out'}
        Split of the pages.
    index : int
        Number of the page, from 0.
    longest_words : int
        Maximum words of filler text around a task.
    """
    draws = Draws(f"{split} {index}")
    write = draws.pick(_MIX)
    # exp of a uniform number in [0, log(longest)): as many pages of 1 to 10 words as of 10 to 100.
    n_words = int(math.exp(draws.below(1000) / 1000 * math.log(longest_words)))
    return write(draws, n_words)


def demo_text(split: Split) -> str:
    """First pages of a split as one text, for calibration or evaluation."""
    return "\n\n".join(page(split, index) for index in range(_TEXT_PAGES[split]))


def drill(index: int) -> str:
    """Page with nothing but a task, asked several times, from which a model learns to attend to earlier tokens."""
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
"""Kinds of pages; each is drawn in proportion to how often it is listed."""
