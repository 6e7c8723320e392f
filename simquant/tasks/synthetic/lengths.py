"""Prompts of a wanted number of tokens."""

from collections.abc import Callable

from simquant.tasks.errors import TaskError
from simquant.tasks.options import TaskOptions

_USUAL = (4096, 2048, 1024, 512, 256)
"""Tokens of a prompt where none are asked for: the first of these that fits."""


def lengths_of(task: str, options: TaskOptions, max_new_tokens: int) -> tuple[int, ...]:
    """The wanted lengths in tokens, or a usual one that fits into the context together with the answer.

    Raises
    ------
    TaskError
        If one does not fit.
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
    """The text `write(n)` for the largest n with which it has at most `n_tokens` tokens; found by bisection.

    Raises
    ------
    TaskError
        If even `write(0)` is longer.
    """
    least = options.count_tokens(write(0))
    if least > n_tokens:
        raise TaskError(
            f"{task}: expected a length of at least {least} tokens, which the question alone takes; got {n_tokens}. "
            "Use larger --task-lengths."
        )
    low, high = 0, 1
    while options.count_tokens(write(high)) <= n_tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if options.count_tokens(write(middle)) <= n_tokens else (low, middle)
    return write(low)
