"""Queries, keys and values of attention layers in full precision, on which quantizers are compared layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from artifacts.model.attention import AttentionLayer, hooked, rotate
from artifacts.model.hooks import evaluating
from artifacts.model.layout import from_rows, to_rows
from artifacts.model.rope import position_tables
from artifacts.model.transformers_release import named_arguments
from artifacts.quantizer import Context, Quantizer
from artifacts.sites import Site


class WindowSites:
    """Keys before rotation and values of all layers in one window, for quantizers that predict one from another.

    Sources of predicted sites are decoded once for a set of quantizers, and freed when the next set comes.

    Parameters
    ----------
    vectors : Mapping[Site, Float[Tensor, "1 heads tokens head_dim"]]
        Keys and values in full precision.
    """

    def __init__(self, vectors: Mapping[Site, Float[Tensor, "1 _ tokens _"]]) -> None:
        self.vectors = vectors
        self._quantizers: Mapping[Site, Quantizer] = {}
        self._sources: frozenset[Site] = frozenset()
        self._rows: dict[Site, Tensor] = {}

    def context(self, quantizers: Mapping[Site, Quantizer], site: Site) -> Context:
        """Decoded sources of a site, from the window's first token on."""
        self._start(quantizers)
        for earlier in sorted(self._sources - self._rows.keys()):
            if earlier < site:
                self.decoded(quantizers, earlier)
        return tuple(self._rows[source] for source in quantizers[site].sources)

    def decoded(self, quantizers: Mapping[Site, Quantizer], site: Site) -> Float[Tensor, "tokens channels"] | None:
        """Decoded tokens of a site that others are predicted from; None for any other site."""
        self._start(quantizers)
        if site in self._sources and site not in self._rows:
            x = self.vectors[site]
            context = self.context(quantizers, site)
            self._rows[site] = quantizers[site].to(x.device).simulate(to_rows(x), _on(x.device, context))
        return self._rows.get(site)

    def _start(self, quantizers: Mapping[Site, Quantizer]) -> None:
        if quantizers is not self._quantizers:
            self._quantizers, self._rows = quantizers, {}
            self._sources = frozenset(source for own in quantizers.values() for source in own.sources)


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Queries, keys and values of one layer for one window, from the model in full precision.

    Parameters
    ----------
    layer : AttentionLayer
        Attention layer.
    query, key : Float[Tensor, "1 heads tokens head_dim"]
        Queries and keys before rotation.
    value : Float[Tensor, "1 kv_heads tokens head_dim"]
        Values as they are cached.
    tables : pair of Tensor, or None
        RoPE cosines and sines; None for a layer without rotation.
    sites : WindowSites
        Keys and values of all layers.
    """

    layer: AttentionLayer
    query: Float[Tensor, "1 q_heads tokens head_dim"]
    key: Float[Tensor, "1 kv_heads tokens head_dim"]
    value: Float[Tensor, "1 kv_heads tokens head_dim"]
    tables: tuple[Tensor, Tensor] | None
    sites: WindowSites

    def rotated(self, x: Float[Tensor, "1 heads tokens head_dim"]) -> Float[Tensor, "1 heads tokens head_dim"]:
        """Keys or queries after rotation."""
        return x if self.tables is None else rotate(x, *self.tables, self.layer.rotation)

    def decoded(
        self, quantizers: Mapping[Site, Quantizer], sink_tokens: int
    ) -> tuple[Float[Tensor, "1 kv_heads tokens head_dim"], Float[Tensor, "1 kv_heads tokens head_dim"]]:
        """Rotated keys and values after encoding and decoding; the first `sink_tokens` tokens in full precision."""
        # Quantizers before RoPE decode, then rotate, as a packed cache does; those after RoPE see rotated keys.
        before, after = (Site(self.layer.layer, "key", stage) for stage in ("pre_rope", "post_rope"))
        if before in quantizers:
            key = self.rotated(self._decoded(quantizers, before, self.key, sink_tokens))
        else:
            key = self._decoded(quantizers, after, self.rotated(self.key), sink_tokens)
        return key, self._decoded(quantizers, Site(self.layer.layer, "value"), self.value, sink_tokens)

    def _decoded(
        self,
        quantizers: Mapping[Site, Quantizer],
        site: Site,
        x: Float[Tensor, "1 heads tokens head_dim"],
        sink_tokens: int,
    ) -> Float[Tensor, "1 heads tokens head_dim"]:
        rows, quantizer = to_rows(x), quantizers[site].to(x.device)
        if sink_tokens >= len(rows):
            return x
        # Sources are decoded from token 0 on. Reuse is right unless scales depend on other tokens, sinks among them.
        known = None if sink_tokens and not quantizer.is_causal else self.sites.decoded(quantizers, site)
        if known is None:
            context = tuple(u[sink_tokens:] for u in _on(x.device, self.sites.context(quantizers, site)))
            read = quantizer.simulate(rows[sink_tokens:], context)
        else:
            read = known[sink_tokens:]
        return from_rows(torch.cat([rows[:sink_tokens], read]), x)


def _on(device: torch.device, context: Context) -> Context:
    return tuple(u.to(device) for u in context)


@torch.no_grad()
def attention_inputs(
    model: nn.Module, layers: Sequence[AttentionLayer], window: Int64[Tensor, " tokens"]
) -> list[AttentionInputs]:
    """Attention inputs of every layer, from one forward pass in full precision over a window without padding.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model; restored afterwards.
    layers : Sequence[AttentionLayer]
        Attention layers of the model.
    window : Int64[Tensor, "tokens"]
        Token ids.
    """
    seen: dict[Site, Tensor] = {}
    tables: dict[int, tuple[Tensor, Tensor]] = {}

    handlers = {site: _keeper(site, seen) for layer in layers for site in _sites(layer)}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(hooked(layers, handlers))
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(_table_keeper(layer, tables), with_kwargs=True)
            stack.callback(hook.remove)
        model(input_ids=window[None].to(next(model.parameters()).device), use_cache=False)
    found, cached = [], WindowSites({site: x for site, x in seen.items() if site.tensor != "query"})
    for layer in layers:
        query, key, value = (seen[site] for site in _sites(layer))
        found.append(AttentionInputs(layer, query, key, value, tables.get(layer.layer), cached))
    return found


def _sites(layer: AttentionLayer) -> tuple[Site, Site, Site]:
    index = layer.layer
    return Site(index, "query", "pre_rope"), Site(index, "key", "pre_rope"), Site(index, "value")


def _keeper(site: Site, seen: dict[Site, Tensor]) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        seen[site] = x.clone()

    return keep


def _table_keeper(layer: AttentionLayer, tables: dict[int, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if layer.rotation != "none":
            tables[layer.layer] = layer.tables(position_tables(module, named_arguments(module, args, kwargs)))

    return keep
