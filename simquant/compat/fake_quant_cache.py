"""Fake-quantized cache: keys and values are encoded and decoded before a cache stores them."""

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
"""Interface that a cache must offer."""


@final
class FakeQuantCache:
    """Wrapper of a cache that quantizes in `update`, and passes every other access on.

    Parameters
    ----------
    cache : object
        Cache with `update(key_states, value_states, layer_idx)`.
    quantizers : mapping from Site to Quantizer
        Quantizers of rotated keys and of values.
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
        """Passes quantized keys and values on, and returns the result of the cache.

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
                f"layers.{layer_idx}: {type(self._cache).__name__}.update: expected all keys and values of the layer, "
                f"a tuple of two tensors; got {type(result).__name__}. Return both from update"
            )
        self._updated.add(layer_idx)
        return result

    def check_updated(self) -> None:
        """Check that every layer with quantizers has updated the cache.

        Raises
        ------
        CacheStateError
            If some layers have not, so that their keys and values were not quantized.
        """
        idle = sorted({site.layer for site in self._quantizers} - self._updated)
        if idle:
            names = ", ".join(f"layers.{layer}" for layer in idle[:6]) + (", ..." if len(idle) > 6 else "")
            raise CacheStateError(
                f"{names}: attention never called cache.{INTERFACE}, so that nothing was quantized there. Pass "
                "**cache_argument(model, cache) and use_cache=True to a model with as many layers, whose attention "
                "updates the cache."
            )

    def _simulated(self, site: Site, x: Tensor) -> Tensor:
        if site not in self._quantizers:
            raise MismatchError(
                f"{site}: expected a quantizer for this site; got none. Calibrate all layers, and give the quantizer "
                "'identity' to one that shall keep full precision."
            )
        # Layers may be on several devices; each quantizer is moved to a device once.
        own = self._moved.get((site, x.device))
        own = own or self._moved.setdefault((site, x.device), self._quantizers[site].to(x.device))
        return from_rows(own.simulate(to_rows(x)), x)

    def __enter__(self) -> "FakeQuantCache":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self.check_updated()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_cache":  # copy and pickle look names up before __init__ has run
            raise AttributeError(name)
        return getattr(self._cache, name)


def fake_quant_cache(cache: Any, quantizers: Artifact | Mapping[Site, Quantizer]) -> FakeQuantCache:
    """Wraps a cache so that every key and value is quantized once, when it is stored.

    Accuracy is that of a quantized cache, as msModelSlim deploys int8 caches; memory is not saved (`packed_cache` does
    that). As a context manager the result also checks on exit that the model has used it.

    Parameters
    ----------
    cache : object
        A transformers cache, or any object with `update(key_states, value_states, layer_idx)` that returns all keys
        and values of the layer.
    quantizers : Artifact or mapping from Site to Quantizer
        Quantizers of rotated keys (`stage: post_rope`) and of values for all layers, with calibrated or per-token
        scales.

    Raises
    ------
    TypeError
        If the cache has no such method.
    MismatchError
        If a quantizer needs other tokens than those given to one `update`.

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
            f"fake_quant_cache: expected an artifact without sinks, since `cache.update` is not told token positions; "
            f"got sink_tokens={quantizers.manifest.sink_tokens}. Calibrate with sink_tokens: 0, or use packed_cache."
        )
    for site, quantizer in quantizers.items():
        _check_quantizer(site, quantizer)
    return FakeQuantCache(cache, quantizers)


def _check_interface(cache: Any) -> None:
    who, update = type(cache).__name__, getattr(cache, "update", None)
    if not callable(update):
        raise TypeError(
            f"fake_quant_cache: expected a cache with the method {INTERFACE}; got {who}, which has no update. Use a "
            "transformers cache"
        )
    # A signature that cannot take these three arguments would fail only in the model's first forward pass.
    try:
        inspect.signature(update).bind(None, None, 0)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"fake_quant_cache: expected a cache with the method {INTERFACE}; got {who}.update, which cannot be called "
            f"so ({error}). Use a transformers cache"
        ) from error


def _check_quantizer(site: Site, quantizer: Quantizer) -> None:
    if site.tensor == "query" or site.stage == "pre_rope":
        raise MismatchError(
            f"{site}: expected quantizers of rotated keys and of values, which `cache.update` is given; got one of "
            f"{'queries' if site.tensor == 'query' else 'keys before RoPE'}. Calibrate with stage: post_rope, or use "
            "simulate."
        )
    if quantizer.tokens_per_scale != 1 or quantizer.sources:
        raise MismatchError(
            f"{site}: expected calibrated or per-token scales; got {quantizer.spec.describe()}, which needs other "
            "tokens than those of one update. Use packed_cache."
        )
