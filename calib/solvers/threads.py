"""Thread pools for work of many small operations: threads take whole items, not parts of an operation."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")

_PARTS_PER_THREAD = 4
"""Parts per thread: more than one, so that others take over from a thread that is delayed."""


def for_each(function: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Calls a function with every item, in as many threads as torch may use, with one torch thread in each.

    Torch cuts an operation into equal parts and waits for the last one. Beside another busy process one of its threads
    is often not running, and every operation waits for it. Here a delayed thread delays one item while others take the
    rest.
    """
    n_threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def call(item: Item) -> None:
        with torch.inference_mode(inference):  # the mode is per thread and off in a new one
            function(item)

    with torch_threads(1), ThreadPoolExecutor(n_threads) as threads:
        for _ in threads.map(call, items):
            pass


def in_parts(work: Callable[[slice], object], n: int) -> None:
    """Runs `n` independent pieces of work, in slices of neighbours, in as many threads as torch has.

    Parameters
    ----------
    work : callable
        Processes a slice of pieces, mostly in compiled functions.
    n : int
        Number of pieces.
    """
    threads = min(torch.get_num_threads(), n)
    if threads <= 1:
        work(slice(0, n))
        return
    n_parts = min(_PARTS_PER_THREAD * threads, n)
    ends = [n * part // n_parts for part in range(n_parts + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, map(slice, ends, ends[1:])))


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Sets the number of threads of torch and `in_parts` inside the context, also in threads started there."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
