"""Trials of the demo tasks, and a check of a model's answer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from calib.demo.draws import Draws
from calib.demo.tasks import TASKS, Trial


def trials(task: str, n_words: int, count: int) -> Iterator[Trial]:
    """Trials of one task with `n_words` words of filler text, none of which is on a page."""
    for index in range(count):
        yield TASKS[task](Draws(f"trial {task} {n_words} {index}"), n_words, 1)


@torch.no_grad()
def is_solved(model: Callable[..., Any], tokenizer: Callable[..., Any], trial: Trial) -> bool:
    """True if greedy decoding gives the answer: each of its tokens is the argmax after the ones before."""
    n_answer = len(tokenizer(trial.answer).input_ids)
    ids = torch.tensor([tokenizer(trial.text).input_ids])
    guesses = model(input_ids=ids, use_cache=False).logits[0, -n_answer - 1 : -1].argmax(-1)
    return bool((guesses == ids[0, -n_answer:]).all())
