"""Work that consists of many small operations, spread over threads as a whole and not operation by operation."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")

_PARTS_PER_THREAD = 4
"""So that a thread that is held up leaves the rest of its share to the others."""


def for_each(function: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Calls a function with every item, in as many threads as torch may use, each of which has torch for itself.

    Torch cuts an operation into equal shares and waits for the last of them. Beside another busy process one of its
    threads is not running then, and every operation lasts until that one has its turn. Here a thread that is held up
    delays one item while others take the rest.
    """
    n_threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def call(item: Item) -> None:
        with torch.inference_mode(inference):  # a thread's own, otherwise off
            function(item)

    with torch_threads(1), ThreadPoolExecutor(n_threads) as threads:
        for _ in threads.map(call, items):
            pass


def in_parts(work: Callable[[slice], object], n: int) -> None:
    """Does `n` independent pieces of work, neighbours together, in as many threads as torch has.

    Parameters
    ----------
    work : callable
        Does the pieces of a slice; it spends its time in compiled functions.
    n : int
        Pieces.
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
    """Has torch, and `in_parts`, use so many threads as long as the block runs, in threads that it starts too."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
