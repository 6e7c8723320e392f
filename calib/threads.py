"""Work that consists of many small operations, spread over threads as a whole and not operation by operation."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


def for_each(function: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Calls a function with every item, in as many threads as torch may use, each of which has torch for itself.

    Torch cuts an operation into equal shares and waits for the last of them. Beside another busy process one of its
    threads is not running then, and every operation lasts until that one has its turn. Here a thread that is held up
    delays one item while others take the rest.
    """
    n_threads = torch.get_num_threads()
    with one_torch_thread(), ThreadPoolExecutor(n_threads) as threads:
        for _ in threads.map(function, items):
            pass


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch does not spread its operations over threads, neither in this thread nor in those that start meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
