"""Context manager under which a transformers model runs on packed KV caches, in `generate()` and elsewhere."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.coding.finite import answered_each_step
from artifacts.errors import MismatchError
from artifacts.model.attention import AttentionLayer, attention_layers, hooked
from artifacts.model.rope import position_tables
from artifacts.model.transformers_release import named_arguments, parameters, passed_cache
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.cache.attention.block_attention import Scoring, attend
from simquant.cache.attention.replaced_attention import Handler, attention_replaced, check_handed
from simquant.cache.attention.tokens import Tokens, watch_tokens
from simquant.cache.evictor import Evictor, Reading, check_evictable
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.cache.store.layer_store import LayerStore
from simquant.cache.transformers_cache import Arrival, PackedCache, PackedLayer, own_layers
from simquant.policy.checks import check_cacheable, check_fit, default_policy
from simquant.policy.policy import CachePolicy


@contextmanager
def packed_cache(
    model: nn.Module,
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    policy: CachePolicy | None = None,
    layers: Sequence[AttentionLayer] | None = None,
) -> Iterator[Callable[[], PackedCache]]:
    """Context in which a model runs on packed caches: keys and values are stored as codes, and decoded block by block.

    The model is restored on exit, also after an exception. With identity quantizers, logits differ from those of a
    `DynamicCache` by rounding alone: attention sums block by block, in float32.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    quantizers : Artifact or mapping from Site to Quantizer
        One for the keys and one for the values of every layer; `Identity` leaves a layer in full precision.
    policy : CachePolicy or None
        Tokens kept in full precision, and eviction. None takes the policy of the artifact's recipe; without one, only
        the artifact's sinks are kept.
    layers : sequence of AttentionLayer or None
        Result of `attention_layers(model)`; None computes it.

    Yields
    ------
    callable
        Makes an empty cache, to be passed as `cache_argument(model, cache)`; each text needs its own.

    Raises
    ------
    MismatchError
        If the artifact was made for another model or lacks layers, if a quantizer shares scales among tokens that the
        policy does not encode together, if no layer can evict, or if the model is called with another cache.

    Examples
    --------
    >>> from simquant import cache_argument
    >>> def reply(model, quantizers, ids):
    ...     with packed_cache(model, quantizers, policy=CachePolicy(sink_tokens=1, residual_tokens=128)) as new_cache:
    ...         return model.generate(ids, **cache_argument(model, new_cache()))
    """
    layers = attention_layers(model) if layers is None else layers
    policy = policy or default_policy(quantizers)
    check_fit(model, quantizers, layers)
    check_cacheable(quantizers, policy)
    check_evictable(policy, layers)
    # `Cache.update` gets rotated keys and no mask. Hooks add the rest: pre-RoPE keys from the projection, padding and
    # rotary tables from the attention module's arguments. Attention then reads the store instead of update's result.
    with ExitStack() as stack:
        stack.enter_context(answered_each_step(model))
        beside = own_layers(model, [layer.layer for layer in layers])
        session = _Session(layers, quantizers, policy, stack.enter_context(watch_tokens(layers)), beside)
        stack.enter_context(attention_replaced(model, session.handlers()))
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(session.before(layer), with_kwargs=True).remove)
            stack.callback(layer.module.register_forward_hook(session.after(layer), always_call=True).remove)
        hooks = {site: session.on_key(site) for site in quantizers if site.stage == "pre_rope"}
        stack.enter_context(hooked(layers, hooks))
        yield session.new_cache


class _Session:
    """State of one `packed_cache` context: passes on to the cache in use what `Cache.update` is not told."""

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        quantizers: Mapping[Site, Quantizer],
        policy: CachePolicy,
        tokens: Tokens,
        beside: Sequence[Any],
    ) -> None:
        self._layers, self._quantizers, self._policy, self._tokens = layers, quantizers, policy, tokens
        self._beside = beside
        self._in_use: dict[int, PackedCache] = {}
        self._n_read = 0  # tokens of the current text, those of the last step included
        self._evictor = None if policy.eviction is None else Evictor(policy.eviction, len(layers))

    def new_cache(self) -> PackedCache:
        """An empty cache for this model."""
        sources = DecodedSources(self._quantizers)
        stores = [LayerStore(layer, self._quantizers, self._policy, sources) for layer in self._layers]
        return PackedCache(stores, self, copy.deepcopy(self._beside))

    def handlers(self) -> dict[nn.Module, Handler]:
        """Attention function of each attention module."""
        return {layer.module: self._reader(layer) for layer in self._layers}

    def before(self, layer: AttentionLayer) -> Callable[..., None]:
        """Pre-forward hook of an attention module: notes the cache in use, padding and rotary tables of the step."""
        # The first parameter of an attention module's forward is the hidden states, whatever a model calls it.
        first, *_ = parameters(layer.module)

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            passed = named_arguments(module, args, kwargs)
            cache, hidden = passed_cache(passed), passed[first]
            if not isinstance(cache, PackedCache) or cache.session is not self:
                _refuse_dropped(module, cache, max(hidden.shape[1], self._n_read + 1))
                got = "a packed cache of another context" if isinstance(cache, PackedCache) else type(cache).__name__
                raise MismatchError(
                    f"layers.{layer.layer}: expected a cache from new_cache() of the context that the model is in; got "
                    f"{got}. Pass **cache_argument(model, new_cache()), or leave the context to run the model without "
                    "a packed cache."
                )
            self._in_use[layer.layer] = cache
            store = _packed(cache, layer)
            self._n_read = store.store.n_columns + hidden.shape[1]
            store.arrival = Arrival(None, self._tokens.real(hidden.shape[0], hidden.shape[1]))
            tables = position_tables(module, passed) if store.store.rotates else None
            if tables is not None:
                cache.tables.note(layer, tables, store.store.n_columns)

        return hook

    def after(self, layer: AttentionLayer) -> Callable[..., None]:
        """Forward hook of an attention module, called also if it fails: clears the state of the step."""

        def hook(*_: Any) -> None:
            cache = self._in_use.pop(layer.layer, None)
            if cache is not None:
                _packed(cache, layer).arrival = _packed(cache, layer).handed = None

        return hook

    def on_key(self, site: Site) -> Callable[[Tensor], None]:
        """Handler that passes keys before rotation to the cache in use."""

        def handle(x: Float[Tensor, "batch kv_heads tokens head_dim"]) -> None:
            layer: PackedLayer = self._in_use[site.layer].layers[site.layer]
            assert layer.arrival is not None, "the attention module's hook comes first"
            layer.arrival = Arrival(x, layer.arrival.real)

        return handle

    def _reader(self, layer: AttentionLayer) -> Handler:
        def read(
            query: Tensor, key: Tensor, value: Tensor, visible: Bool[Tensor, "batch queries tokens"], scoring: Scoring
        ) -> Tensor:
            cache = self._in_use[layer.layer]
            check_handed(layer.module, _packed(cache, layer).handed, (key, value))
            store = _packed(cache, layer).store
            if store.policy.exact_prefill and store.n_columns == query.shape[2]:  # the cache was empty before this step
                mean = attend(query, key, value, visible, scoring)
            else:
                mean = store.attend(query, visible, scoring, cache.tables)
            # Eviction follows attention: the pass that exceeds a budget still reads every token, as SnapKV's prefill.
            if self._evictor is not None:
                self._evictor.after_step(store, Reading(query, visible, scoring, cache.tables))
            store.end_step()
            return mean

        return read


def _packed(cache: PackedCache, layer: AttentionLayer) -> PackedLayer:
    found: PackedLayer = cache.layers[layer.layer]
    return found


def _refuse_dropped(module: nn.Module, cache: Any, n_tokens: int) -> None:
    """Raises if `generate` of a model with two sets of rotary factors (Phi-3) has replaced the packed cache."""
    limit = getattr(getattr(module, "config", None), "original_max_position_embeddings", None)
    if limit is not None and n_tokens > limit and not isinstance(cache, PackedCache):
        raise MismatchError(
            f"{type(module).__name__}: generate() dropped the packed cache: beyond {limit} tokens "
            f"(original_max_position_embeddings) this model uses other rotary factors, and prefills a text of "
            f"{n_tokens} tokens again. Keep prompt and answer within {limit} tokens, or call the model itself, step "
            "by step."
        )
