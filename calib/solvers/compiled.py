"""Loops over many small steps, compiled: each step would be a call of its own elsewhere, and wait for other threads.

Compiled functions take arrays and numbers, and release the interpreter's lock, so that threads run them side by side.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


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
