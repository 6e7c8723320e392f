"""A packed cache with KIVI's settings, as users of KIVI for Qwen and Llama know it."""

from contextlib import ExitStack
from dataclasses import asdict
from weakref import WeakSet

from torch import nn

from artifacts.attention import attention_layers
from artifacts.errors import MismatchError
from simquant.cache.packed import packed_cache
from simquant.cache.transformers_cache import PackedCache
from simquant.fake_quant.stored import Stored
from simquant.kivi.kivi import KIVISettings

_OPEN: WeakSet[nn.Module] = WeakSet()
"""Models with an open cache: looking for the layers of one would run it without its cache."""


class KIVICache(PackedCache):
    """An empty cache for one model, which reads packed keys and values until the cache is closed.

    It closes at the end of a `with` block or by `close`; the model is then as it was, and what the cache holds can
    still be counted. A model has one open KIVICache at a time: `reset` empties it for another text.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    **settings
        k_bits, v_bits, group_size, residual_length: see `KIVISettings`.

    Raises
    ------
    MismatchError
        If another cache of the model is open.

    Examples
    --------
    >>> from simquant import cache_argument
    >>> def reply(model, ids):
    ...     with KIVICache(model, k_bits=2, v_bits=2, group_size=32, residual_length=128) as cache:
    ...         return model.generate(ids, **cache_argument(model, cache)), cache.get_cache_info()
    """

    def __init__(self, model: nn.Module, **settings: int) -> None:
        self.settings = KIVISettings(**settings)
        if model in _OPEN:
            raise MismatchError(
                f"KIVICache: {type(model).__name__} has an open KIVICache already. Pass that one, "
                "`reset` it for another text, or `close` it first."
            )
        layers = attention_layers(model)
        self._stack = ExitStack()
        new_cache = self._stack.enter_context(
            packed_cache(model, self.settings.quantizers(layers), policy=self.settings.policy, layers=layers)
        )
        _OPEN.add(model)
        self._stack.callback(_OPEN.discard, model)
        empty = new_cache()
        super().__init__([layer.store for layer in empty.layers], empty.session)

    def get_cache_info(self) -> dict[str, int | float]:
        """Settings, lengths and true sizes.

        `quantized_len` and `residual_len` are those of the longest sequence; tokens that a sliding window has passed
        are in neither. `effective_bits` per element and `memory_ratio`, over the bytes in the model's dtype, count all
        that is held, for every beam; in `size_bytes` what beams share counts once.
        """
        stores = [store for layer in self.layers for _, store in layer.store.stores()]
        lossy = [store for store in stores if store.quantizer.spec.bits < 16]
        longest = max(lossy or stores, key=lambda store: store.n_encoded + store.n_exact, default=None)
        n_held = longest.n_encoded + longest.n_exact if longest is not None else 0
        n_quantized = longest.n_encoded if longest is not None and lossy else 0
        stored = Stored.of(stores)
        return {
            "num_layers": len(self.layers),
            "total_seq_len": self.get_seq_length(),
            "quantized_len": n_quantized,
            "residual_len": n_held - n_quantized,
            **asdict(self.settings),
            "effective_bits": stored.bits,
            "memory_ratio": stored.memory_ratio,
            "size_bytes": self.nbytes,
        }

    def close(self) -> None:
        """The model is as it was; the cache keeps what it holds and takes nothing more."""
        self._stack.close()

    def __enter__(self) -> "KIVICache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
