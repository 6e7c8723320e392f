"""Triton where it is installed, and a clear refusal where it is not.

The programs of this package are decorated when they are imported but need Triton only when they are started, so that
every module can be imported without it.
"""

import inspect
from collections.abc import Callable
from importlib import import_module, util
from typing import Any, NoReturn

import torch

INSTALLED = util.find_spec("triton") is not None

tl: Any = import_module("triton.language") if INSTALLED else None
constexpr: Any = tl.constexpr if INSTALLED else object


def product_type(dtype: torch.dtype) -> Any:
    """The Triton type in which numbers of a dtype are multiplied: their own, but float32 for bfloat16 in the
    interpreter, which multiplies its bit patterns as if they were integers (seen in 3.9).
    """
    interpreted = import_module("triton").knobs.runtime.interpret if INSTALLED else False
    name = "float32" if interpreted and dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    return getattr(tl, name, None)


class Missing:
    """What a program is without Triton: asking to start it says what to install."""

    def __getitem__(self, grid: object) -> NoReturn:
        raise ImportError(
            "simquant.kernels: Triton is needed to run a kernel and is not installed; pip install 'kvgauge[triton]'"
        )


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or a program that cannot be started.

    Triton reads the source and the globals of the function itself, not of what checks its annotations in the tests.
    """
    return import_module("triton").jit(inspect.unwrap(function)) if INSTALLED else Missing()
