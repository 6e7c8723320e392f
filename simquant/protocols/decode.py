"""Protocol 'decode': one forward pass with the logits of step-by-step decoding on a packed cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.coding.finite import answered_each_step
from artifacts.errors import MismatchError
from artifacts.model.attention import AttentionLayer, attention_layers, hooked
from artifacts.model.hooks import intercept_cache
from artifacts.model.rope import position_tables
from artifacts.model.transformers_release import named_arguments
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.cache.attention.block_attention import Scoring
from simquant.cache.attention.replaced_attention import Handler, attention_replaced, check_handed
from simquant.cache.attention.tokens import Tokens, watch_tokens
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.cache.store.layer_store import LayerStore
from simquant.cache.store.rotary_tables import RotaryTables
from simquant.policy.checks import check_cacheable, check_fit, default_policy
from simquant.policy.policy import TENSORS, CachePolicy
from simquant.protocols.chunking import Chunking
from simquant.protocols.two_sided_attention import encoded_tokens, two_sided_attention
from simquant.usage import Usage, counted_passes

_SCORES = 2**22
"""Attention scores in memory at a time; queries are split so that there are no more."""


@contextmanager
def decode_exact(
    model: nn.Module,
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    policy: CachePolicy | None = None,
    chunking: Chunking | None = None,
    layers: Sequence[AttentionLayer] | None = None,
) -> Iterator[Usage]:
    """Context in which one forward pass over whole texts gives the logits of decoding them step by step.

    Attention is two-sided: of two score matrices, one from keys in full precision and one from decoded keys, each
    query takes the entries that a packed cache would give it at its step. Sinks and residual window are in full
    precision, older tokens decoded. Texts have no padding, and no cache is passed. The model is restored on exit,
    also after an exception.

    Parameters
    ----------
    model, quantizers, policy, layers
        See `packed_cache`.
    chunking : Chunking or None
        Steps in which the text would be read; None is token by token.

    Yields
    ------
    Usage
        Counts of tokens and bytes that the caches would hold at the end of each text.

    Raises
    ------
    MismatchError
        If the quantizers do not fit (see `packed_cache`), or the model is called with padding or with a filled cache.
    """
    layers = attention_layers(model) if layers is None else layers
    policy = policy or default_policy(quantizers)
    check_fit(model, quantizers, layers)
    check_cacheable(quantizers, policy)
    if policy.eviction is not None:
        raise MismatchError(
            f"decode_exact: expected a policy without eviction, which one pass over a text cannot show; got a policy "
            f"with {policy.describe()}. Use packed_cache, or the protocol 'cache'."
        )
    with ExitStack() as stack:
        stack.enter_context(answered_each_step(model))
        decoding = _Decoding(quantizers, policy, chunking or Chunking(), stack.enter_context(watch_tokens(layers)))
        stack.enter_context(attention_replaced(model, {layer.module: decoding.handler(layer) for layer in layers}))
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(decoding.before(layer), with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(intercept_cache(layer.module, decoding.on_cached(layer)).remove)
        hooks = {site: decoding.on_key(site) for site in quantizers if site.stage == "pre_rope"}
        stack.enter_context(hooked(layers, hooks))
        stack.enter_context(counted_passes(model, decoding.usage))
        yield decoding.usage


class _Decoding:
    """State of one `decode_exact` context: hooks and handlers of the attention modules."""

    def __init__(
        self, quantizers: Mapping[Site, Quantizer], policy: CachePolicy, chunking: Chunking, tokens: Tokens
    ) -> None:
        self.usage = Usage(quantizers)
        self._quantizers, self._policy, self._chunking, self._tokens = quantizers, policy, chunking, tokens
        self._sources = DecodedSources(quantizers)
        self._tables: dict[int, RotaryTables] = {}
        self._keys: dict[int, Tensor] = {}
        self._cached: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, layer: AttentionLayer) -> Callable[..., None]:
        """Pre-forward hook of an attention module: notes the rotary tables of its step."""

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self._tokens.padded or self._tokens.n_past:
                raise MismatchError(
                    f"layers.{layer.layer}: decode_exact: expected whole texts without padding and without a filled "
                    f"cache; got {'padding' if self._tokens.padded else f'{self._tokens.n_past} tokens in the cache'}. "
                    "Pass texts one at a time without past_key_values, or use packed_cache."
                )
            self._tables[layer.layer] = RotaryTables()
            tables = position_tables(module, named_arguments(module, args, kwargs))
            if tables is not None:
                self._tables[layer.layer].note(layer, tables, 0)

        return note

    def on_key(self, site: Site) -> Callable[[Tensor], None]:
        """Handler that holds the keys before rotation until attention runs."""

        def handle(x: Float[Tensor, "batch kv_heads tokens head_dim"]) -> None:
            self._keys[site.layer] = x

        return handle

    def on_cached(self, layer: AttentionLayer) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Handler that holds the keys and values given to the cache until attention runs."""

        def handle(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            self._cached[layer.layer] = key, value
            return key, value

        return handle

    def handler(self, layer: AttentionLayer) -> Handler:
        """Attention function of one layer."""

        def attend(
            query: Tensor, key: Tensor, value: Tensor, visible: Bool[Tensor, "batch queries tokens"], scoring: Scoring
        ) -> Tensor:
            # A store that is filled with the whole text encodes each token with the scales that it has when it leaves
            # the window: the codes are those of step-by-step decoding. Only the mask says which query reads them.
            check_handed(layer.module, self._cached.pop(layer.layer, None), (key, value))
            store = LayerStore(layer, self._quantizers, self._policy, self._sources)
            store.append(self._keys.pop(layer.layer, key), value, None)
            for site, tokens in store.stores():
                self.usage.add_store(site, tokens)
            rows = []
            for row, sequence in enumerate(store.sequences):
                every = slice(0, key.shape[2])
                decoded = store.key(sequence, row, every, self._tables[layer.layer]), store.value(sequence, every)
                seen = visible[min(row, len(visible) - 1)]
                rows.append(self._attend(query[row], (key[row], value[row]), decoded, seen, scoring))
            store.end_step()
            return torch.stack(rows)

        return attend

    def _attend(
        self,
        query: Float[Tensor, "q_heads tokens head_dim"],
        exact: tuple[Tensor, Tensor],
        decoded: tuple[Tensor, Tensor],
        visible: Bool[Tensor, "tokens tokens"],
        scoring: Scoring,
    ) -> Float[Tensor, "tokens q_heads head_dim"]:
        key, value = (self._encoded(tensor, query.shape[1]).to(query.device) for tensor in TENSORS)
        # Two score matrices of heads x queries x tokens would not fit for long texts: the queries are split.
        part_tokens = max(1, _SCORES // (query.shape[0] * query.shape[1]))
        parts = zip(
            query.split(part_tokens, dim=1), *(x.split(part_tokens) for x in (key, value, visible)), strict=True
        )
        return torch.cat([two_sided_attention(part, exact, decoded, tuple(own), scoring) for part, *own in parts])

    def _encoded(self, tensor: Literal["key", "value"], n_tokens: int) -> Bool[Tensor, "queries tokens"]:
        """Mask of the tokens that each query reads decoded."""
        return encoded_tokens(self._policy.window(tensor), self._policy, self._chunking, n_tokens)
