"""Loops over many small steps, compiled: each step would be a call of its own elsewhere, and wait for other threads.

Compiled functions take arrays and numbers, and release the interpreter's lock, so that threads run them side by side.
"""

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numba
import torch

F = TypeVar("F", bound=Callable[..., Any])

_PARTS_PER_THREAD = 4
"""So that a thread that is held up leaves the rest of its share to the others."""


def compiled(function: F) -> F:
    """The function as machine code, made when it is first called.

    It is kept on disk between processes, beside the module, in the user's cache or in ``NUMBA_CACHE_DIR``; where none
    of them can be written to, every process makes it anew. Run-time checks of annotations stay outside.
    """
    plain = inspect.unwrap(function)
    try:
        return cast(F, numba.njit(nogil=True, error_model="numpy", cache=True)(plain))
    except RuntimeError:  # no place to keep it
        return cast(F, numba.njit(nogil=True, error_model="numpy")(plain))


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Has torch, and `in_parts`, use so many threads as long as the block runs, in threads that it starts too."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
