"""Triton where it is installed; without it every module imports, and `support.runs_on` keeps programs from starting."""

import inspect
from collections.abc import Callable
from importlib import import_module, util
from typing import Any

import torch

INSTALLED = util.find_spec("triton") is not None

tl: Any = import_module("triton.language") if INSTALLED else None
constexpr: Any = tl.constexpr if INSTALLED else object


def product_type(dtype: torch.dtype) -> Any:
    """The Triton type in which numbers of a dtype are multiplied: their own, but float32 for bfloat16 in the
    interpreter, which multiplies its bit patterns as if they were integers (seen in 3.9).
    """
    interpreted = import_module("triton").knobs.runtime.interpret
    return getattr(tl, "float32" if interpreted and dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` of the function itself, not of the wrapper that checks its annotations in the tests."""
    return import_module("triton").jit(inspect.unwrap(function)) if INSTALLED else function
