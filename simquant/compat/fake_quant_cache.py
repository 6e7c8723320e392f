"""A cache whose keys and values are quantized on their way in."""

import inspect
from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.artifact import Artifact
from artifacts.errors import MismatchError
from artifacts.model.layout import from_rows, to_rows
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.cache.errors import CacheStateError

INTERFACE = "update(key_states, value_states, layer_idx)"
"""What a cache must offer."""


@final
class FakeQuantCache:
    """What `fake_quant_cache` makes: apart from `update` it is the cache that it wraps.

    Parameters
    ----------
    cache : object
        With `update(key_states, value_states, layer_idx)`.
    quantizers : mapping from Site to Quantizer
        For rotated keys and for values.
    """

    def __init__(self, cache: Any, quantizers: Mapping[Site, Quantizer]) -> None:
        self._cache, self._quantizers = cache, quantizers
        self._moved: dict[tuple[Site, torch.device], Quantizer] = {}
        self._updated: set[int] = set()

    def update(
        self,
        key_states: Float[Tensor, "batch kv_heads tokens head_dim"],
        value_states: Float[Tensor, "batch kv_heads tokens head_dim"],
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hands quantized keys and values on, and returns what the cache returns.

        Raises
        ------
        MismatchError
            If the layer has no quantizers, or has another number of channels.
        TypeError
            If the cache does not return keys and values.
        """
        key = self._simulated(Site(layer_idx, "key", "post_rope"), key_states)
        value = self._simulated(Site(layer_idx, "value"), value_states)
        result = self._cache.update(key, value, layer_idx, *args, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"layers.{layer_idx}: {type(self._cache).__name__}.update must return all keys and values of the "
                f"layer, as a tuple of two tensors; got {type(result).__name__}"
            )
        self._updated.add(layer_idx)
        return result

    def check_updated(self) -> None:
        """Every layer with quantizers has used the cache.

        Raises
        ------
        CacheStateError
            If some have not: their keys and values were not quantized.
        """
        idle = sorted({site.layer for site in self._quantizers} - self._updated)
        if idle:
            names = ", ".join(f"layers.{layer}" for layer in idle[:6]) + (", ..." if len(idle) > 6 else "")
            raise CacheStateError(
                f"{names}: the attention never called cache.{INTERFACE}, so nothing was quantized there. Pass "
                "**cache_argument(model, cache) with use_cache=True to a model of as many layers, whose attention "
                "updates it."
            )

    def _simulated(self, site: Site, x: Tensor) -> Tensor:
        if site not in self._quantizers:
            raise MismatchError(
                f"{site}: the cache has no quantizer for it. A layer that shall stay exact carries the quantizer "
                "'identity'; otherwise calibrate all layers."
            )
        own = self._moved.get((site, x.device))
        own = own or self._moved.setdefault((site, x.device), self._quantizers[site].to(x.device))
        return from_rows(own.simulate(to_rows(x)), x)

    def __enter__(self) -> "FakeQuantCache":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self.check_updated()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_cache":  # copying asks before there is a cache
            raise AttributeError(name)
        return getattr(self._cache, name)


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
