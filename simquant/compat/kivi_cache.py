"""Packed cache with KIVI's settings, under the interface of KIVI for Qwen and Llama."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary, finalize

from torch import nn

from artifacts.model.attention import attention_layers
from simquant.cache.packed import packed_cache
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.cache.store.layer_store import LayerStore
from simquant.cache.transformers_cache import PackedCache, own_layers
from simquant.compat.kivi import KIVISettings
from simquant.usage import StoredBytes


class _Opened:
    """Layers and `packed_cache` context of a model, shared by its open caches."""

    def __init__(self, model: nn.Module, settings: KIVISettings) -> None:
        self.layers, self._n_open = attention_layers(model), 0
        quantizers = settings.quantizers(self.layers)
        self._stack = ExitStack()
        context = packed_cache(model, quantizers, policy=settings.policy, layers=self.layers)
        self.session = self._stack.enter_context(context)().session
        _OPEN[model] = self
        self._stack.callback(_OPEN.pop, model)
        self.own_layers = own_layers(model, [layer.layer for layer in self.layers])

    def until_closed(self, cache: "KIVICache") -> Callable[[], object]:
        """Counts an open cache, until the returned function is called or the cache is garbage-collected."""
        self._n_open += 1
        # A finalizer runs once: by `close`, or at garbage collection of a cache that was never closed.
        closing = finalize(cache, self._close_one)
        closing.atexit = False
        return closing

    def _close_one(self) -> None:
        self._n_open -= 1
        if not self._n_open:
            self._stack.close()


_OPEN: WeakKeyDictionary[nn.Module, _Opened] = WeakKeyDictionary()


class KIVICache(PackedCache):
    """Empty packed cache for one model, whose attention reads packed caches until the last one is closed.

    A cache closes at the end of a `with` block or by `close`; its contents can still be counted then. A model may have
    several open caches, with different settings, and is restored when the last is closed. A deep copy grows
    independently, as long as the original is open.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    **settings
        k_bits, v_bits, group_size, residual_length: see `KIVISettings`.

    Examples
    --------
    >>> from simquant import cache_argument
    >>> def reply(model, ids):
    ...     with KIVICache(model, k_bits=2, v_bits=2, group_size=32, residual_length=128) as cache:
    ...         return model.generate(ids, **cache_argument(model, cache)), cache.get_cache_info()
    """

    def __init__(self, model: nn.Module, **settings: int) -> None:
        self.settings = KIVISettings(**settings)
        opened = _OPEN.get(model) or _Opened(model, self.settings)
        quantizers = self.settings.quantizers(opened.layers)
        sources = DecodedSources(quantizers)
        stores = [LayerStore(layer, quantizers, self.settings.policy, sources) for layer in opened.layers]
        super().__init__(stores, opened.session, copy.deepcopy(opened.own_layers))
        self._closing = opened.until_closed(self)

    def get_cache_info(self) -> dict[str, int | float]:
        """Settings, lengths and measured sizes of the cache.

        `quantized_len` and `residual_len` are those of the longest sequence, without tokens that a sliding window has
        dropped. `effective_bits` per element and `memory_ratio`, over the bytes in the model's dtype, count every beam
        in full; `size_bytes` counts tensors that beams share once.
        """
        # Lengths are those of sites with fewer than 16 bits; if all are in full precision, every token is residual.
        stores = [store for layer in self.packed for _, store in layer.store.stores()]
        lossy = [store for store in stores if store.quantizer.spec.bits < 16]
        longest = max(lossy or stores, key=lambda store: store.n_encoded + store.n_exact, default=None)
        n_held = longest.n_encoded + longest.n_exact if longest is not None else 0
        n_quantized = longest.n_encoded if longest is not None and lossy else 0
        stored = StoredBytes.of(stores)
        return {
            "num_layers": len(self.packed),
            "total_seq_len": self.get_seq_length(),
            "quantized_len": n_quantized,
            "residual_len": n_held - n_quantized,
            **asdict(self.settings),
            "effective_bits": stored.bits,
            "memory_ratio": stored.memory_ratio,
            "size_bytes": self.nbytes,
        }

    def close(self) -> None:
        """Closes the cache, which keeps its contents; the model is restored with its last open cache."""
        self._closing()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KIVICache":
        """Copy that grows independently, as long as this cache is open."""
        other = super().__deepcopy__(memo)
        assert isinstance(other, KIVICache), "a copy is of its original's class"
        other._closing = lambda: None
        return other

    def __enter__(self) -> "KIVICache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
