"""Differences between the supported releases of transformers: 5.24 renames `past_key_values` to `cache`.

All code that calls a model gets the names here. They are read from the signatures of the modules, so that a model with
its own code keeps its names, and transformers is not imported.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from typing import Any

from torch import nn

from artifacts.errors import UnsupportedReleaseError

OLDEST, NEWEST = (5, 17), (5, 24)

_KEYWORDS = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")


def check_release() -> None:
    """Checks that the installed release of transformers is supported.

    Raises
    ------
    UnsupportedReleaseError
        If another one is installed. Names both and the command that installs a supported one.
    """
    installed = metadata.version("transformers")
    found = re.match(r"(\d+)\.(\d+)", installed)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        oldest, newest, beyond = (f"{major}.{minor}" for major, minor in (OLDEST, NEWEST, (NEWEST[0], NEWEST[1] + 1)))
        raise UnsupportedReleaseError(
            f"transformers: expected a release from {oldest} to {newest}; got {installed}. "
            f'Type: pip install "transformers>={oldest},<{beyond}"'
        )


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Parameter names of a module's forward, in order."""
    return _parameters(type(module).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a module's call, by name."""
    return dict(zip(parameters(module), args, strict=False)) | kwargs


def cache_keyword(module: nn.Module) -> str | None:
    """Name of the cache parameter of a module's forward; None without one."""
    return next((name for name in _KEYWORDS if name in parameters(module)), None)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Cache as the keyword argument of a model and its `generate`, for every supported release.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model, or a wrapper around one.
    cache : object
        From `new_cache()` of `packed_cache`, or any other that the model takes.

    Returns
    -------
    dict
        One entry, to be passed as `**cache_argument(model, cache)`.

    Examples
    --------
    >>> def reply(model, cache, ids):
    ...     return model.generate(ids, **cache_argument(model, cache))
    """
    # A wrapper such as PEFT's takes *args and **kwargs: the first module inside with a cache parameter decides.
    keywords = map(cache_keyword, model.modules())
    return {next(filter(None, keywords), _KEYWORDS[0]): cache}


def exchange_cache(
    module: nn.Module, arguments: tuple[Any, dict[str, Any]], exchange: Callable[[Any], Any]
) -> tuple[Any, dict[str, Any]]:
    """Positional and named arguments of a call, with the cache (or None) replaced."""
    (args, kwargs), name = arguments, cache_keyword(module)
    assert name is not None, "modules that take no cache are never asked"
    # Models pass the cache by position or by name: replace it in the same place, or the callee gets it twice.
    place = parameters(module).index(name)
    if place < len(args):
        return (*args[:place], exchange(args[place]), *args[place + 1 :]), kwargs
    return args, {**kwargs, name: exchange(kwargs.get(name))}


def passed_cache(arguments: Mapping[str, Any]) -> Any:
    """Cache among a module's keyword arguments; None if there is none."""
    return next((arguments[name] for name in _KEYWORDS if arguments.get(name) is not None), None)


def returned_cache(output: Any) -> Any:
    """Cache in the output of a model or its `generate`; None if there is none."""
    return next((output[name] for name in _KEYWORDS if name in output), None)
