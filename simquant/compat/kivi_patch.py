"""Patch that makes a model's `generate` use KIVI caches."""

from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from artifacts.errors import InvalidValueError
from artifacts.model.transformers_release import cache_argument, passed_cache
from simquant.compat.kivi import KIVISettings
from simquant.compat.kivi_cache import KIVICache

_ADDED = ("new_kivi_cache", "generate")


def patch_model(model: nn.Module, *, auto_inject_cache: bool = True, **settings: int) -> None:
    """Adds `new_kivi_cache()` to a model, and a `generate` that uses a new one in each call.

    Calls with a cache of their own or `use_cache=False` are unchanged, and so is the model between calls.
    `unpatch_model` removes the patch.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    auto_inject_cache : bool
        Replace `generate`, too.
    **settings
        k_bits, v_bits, group_size, residual_length: see `KIVISettings`.

    Raises
    ------
    ValueError
        If a setting is out of range, or the model is patched already.
    """
    if "new_kivi_cache" in vars(model):
        raise InvalidValueError(
            f"patch_model: {type(model).__name__} is patched already; call unpatch_model(model) first"
        )
    KIVISettings(**settings)  # raises here rather than at the first text
    vars(model)["new_kivi_cache"] = partial(KIVICache, model, **settings)
    # Attributes of the instance hide the class's methods; removing them restores the model.
    if auto_inject_cache:
        vars(model)["generate"] = MethodType(_generate, model)


def unpatch_model(model: nn.Module) -> None:
    """Removes the patch of `patch_model`; a model without it is unchanged."""
    if "new_kivi_cache" in vars(model):
        for name in _ADDED:
            vars(model).pop(name, None)


def _generate(model: Any, *args: Any, **options: Any) -> Any:
    generate = type(model).generate
    if passed_cache(options) is not None or options.get("use_cache") is False:
        return generate(model, *args, **options)
    with model.new_kivi_cache() as cache:
        return generate(model, *args, **{**options, **cache_argument(model, cache)})
