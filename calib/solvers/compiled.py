"""Compilation of loops over many small steps, each of which would be a tensor operation of its own.

Compiled functions take arrays and numbers and release the interpreter's lock, so that threads run them in parallel.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Function compiled to machine code on its first call.

    The code is cached on disk, beside the module, in the user's cache or in ``NUMBA_CACHE_DIR``; if none of them is
    writable, every process compiles again. Run-time checks of annotations are left out.
    """
    plain = inspect.unwrap(function)
    try:
        return cast(F, numba.njit(nogil=True, error_model="numpy", cache=True)(plain))
    except RuntimeError:  # no writable place for the cache
        return cast(F, numba.njit(nogil=True, error_model="numpy")(plain))
