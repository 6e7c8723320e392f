"""Prompts of a given number of tokens."""

from collections.abc import Callable

from simquant.tasks.errors import TaskError
from simquant.tasks.options import TaskOptions

_USUAL = (4096, 2048, 1024, 512, 256)
"""Default prompt lengths in tokens: the first that fits into the context is used."""


def lengths_of(task: str, options: TaskOptions, max_new_tokens: int) -> tuple[int, ...]:
    """Prompt lengths of the options, or the longest default that leaves room for the answer in the context.

    Raises
    ------
    TaskError
        If a length does not fit.
    """
    room = options.context_tokens - max_new_tokens
    lengths = options.lengths or (next((length for length in _USUAL if length <= room), room),)
    if max(lengths) > room:
        raise TaskError(
            f"{task}: expected prompts of at most {room} tokens, which leaves {max_new_tokens} of the context of "
            f"{options.context_tokens} for the answer; got {max(lengths)}. Use smaller --task-lengths, or --maxseqlen."
        )
    return lengths


def longest_fit(write: Callable[[int], str], n_tokens: int, options: TaskOptions, task: str) -> str:
    """Text `write(n)` of at most `n_tokens` tokens with the largest n, found by bisection.

    Raises
    ------
    TaskError
        If even `write(0)` is longer.
    """
    least = options.count_tokens(write(0))
    if least > n_tokens:
        raise TaskError(
            f"{task}: expected a length of at least {least} tokens, which the question alone needs; got {n_tokens}. "
            "Use larger --task-lengths."
        )
    # Doubling until the text is too long, then bisection: write(low) fits, write(high) does not.
    low, high = 0, 1
    while options.count_tokens(write(high)) <= n_tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if options.count_tokens(write(middle)) <= n_tokens else (low, middle)
    return write(low)
