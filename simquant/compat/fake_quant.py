"""Any cache that a model updates layer by layer, with quantized keys and values in it."""

import inspect
from collections.abc import Mapping
from typing import Any

from artifacts.artifact import Artifact
from artifacts.errors import MismatchError
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.compat.fake_quant_cache import INTERFACE, FakeQuantCache


def fake_quant_cache(cache: Any, quantizers: Artifact | Mapping[Site, Quantizer]) -> FakeQuantCache:
    """The cache, with every key and value quantized once on its way in.

    As msModelSlim deploys int8 caches: accuracy is that of the quantized cache, memory is not saved (`packed_cache`
    does). As a context manager it also checks, at the end, that the model used it.

    Parameters
    ----------
    cache : object
        A transformers cache, or anything with `update(key_states, value_states, layer_idx)`, which returns all keys
        and values of the layer.
    quantizers : Artifact or mapping from Site to Quantizer
        For rotated keys (`stage: post_rope`) and values of all layers; calibrated, or with scales of single tokens.

    Raises
    ------
    TypeError
        If the cache has no such method.
    MismatchError
        If a quantizer needs more than the tokens that `update` gets.

    Examples
    --------
    >>> from simquant import cache_argument
    >>> def reply(model, quantizers, ids, cache):
    ...     with fake_quant_cache(cache, quantizers) as quantized:
    ...         return model.generate(ids, **cache_argument(model, quantized))
    """
    _check_interface(cache)
    if isinstance(quantizers, Artifact) and quantizers.manifest.sink_tokens:
        raise MismatchError(
            f"fake_quant_cache: the artifact keeps its first {quantizers.manifest.sink_tokens} tokens exact, and "
            "`cache.update` does not say which tokens those are. Calibrate with sink_tokens: 0, or use packed_cache."
        )
    for site, quantizer in quantizers.items():
        _check_quantizer(site, quantizer)
    return FakeQuantCache(cache, quantizers)


def _check_interface(cache: Any) -> None:
    who, update = type(cache).__name__, getattr(cache, "update", None)
    if not callable(update):
        raise TypeError(f"fake_quant_cache: expected a cache with the method {INTERFACE}; {who} has no update")
    try:
        inspect.signature(update).bind(None, None, 0)
    except (TypeError, ValueError) as error:
        raise TypeError(f"fake_quant_cache: {who}.update cannot be called as {INTERFACE}: {error}") from error


def _check_quantizer(site: Site, quantizer: Quantizer) -> None:
    if site.tensor == "query" or site.stage == "pre_rope":
        raise MismatchError(
            f"{site}: `cache.update` gets rotated keys, and values. Calibrate with stage: post_rope, or use simulate."
        )
    if quantizer.tokens_per_scale != 1 or quantizer.sources:
        raise MismatchError(
            f"{site}: {quantizer.spec.describe()} needs more than the tokens of one update. Use calibrated scales or "
            "scales of single tokens, or packed_cache."
        )
