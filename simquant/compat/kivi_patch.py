"""A model whose `generate` fills KIVI caches by itself."""

from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from artifacts.model.transformers_release import cache_argument, passed_cache
from simquant.compat.kivi import KIVISettings
from simquant.compat.kivi_cache import KIVICache

_ADDED = ("new_kivi_cache", "generate")


def patch_model(model: nn.Module, *, auto_inject_cache: bool = True, **settings: int) -> None:
    """Gives a model `new_kivi_cache()`, and a `generate` that fills a fresh one at each call.

    A call that brings a cache of its own, or `use_cache=False`, is left alone; so is the model between calls.
    `unpatch_model` undoes it.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    auto_inject_cache : bool
        Whether `generate` changes.
    **settings
        k_bits, v_bits, group_size, residual_length: see `KIVISettings`.

    Raises
    ------
    ValueError
        If a setting is out of range, or the model is patched already.
    """
    if "new_kivi_cache" in vars(model):
        raise ValueError(f"patch_model: {type(model).__name__} is patched already; call unpatch_model(model) first")
    KIVISettings(**settings)  # refused here rather than by the first text
    vars(model)["new_kivi_cache"] = partial(KIVICache, model, **settings)
    if auto_inject_cache:
        vars(model)["generate"] = MethodType(_generate, model)


def unpatch_model(model: nn.Module) -> None:
    """Undoes `patch_model`; a model that is not patched stays as it is."""
    if "new_kivi_cache" in vars(model):
        for name in _ADDED:
            vars(model).pop(name, None)


def _generate(model: Any, *args: Any, **options: Any) -> Any:
    generate = type(model).generate
    if passed_cache(options) is not None or options.get("use_cache") is False:
        return generate(model, *args, **options)
    with model.new_kivi_cache() as cache:
        return generate(model, *args, **{**options, **cache_argument(model, cache)})
