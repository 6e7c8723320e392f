"""What attention layers read while the exact model runs: the ground on which quantizers are compared layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from artifacts.attention import AttentionLayer, rotate, tapped
from artifacts.layout import from_rows, to_rows
from artifacts.quantizer import Context, Quantizer
from artifacts.rope import position_tables
from artifacts.sites import Site
from artifacts.taps import evaluating


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What one layer attends with while the exact model reads one window.

    Parameters
    ----------
    layer : AttentionLayer
        The layer.
    query, key : Float[Tensor, "1 heads tokens head_dim"]
        Before rotation.
    value : Float[Tensor, "1 kv_heads tokens head_dim"]
        As it is cached.
    tables : pair of Tensor, or None
        The cosines and sines that `rotate` reads; None where nothing rotates.
    sites : Mapping[Site, Float[Tensor, "1 heads tokens head_dim"]]
        Keys before rotation and values of all layers, for quantizers that predict one from another.
    """

    layer: AttentionLayer
    query: Float[Tensor, "1 q_heads tokens head_dim"]
    key: Float[Tensor, "1 kv_heads tokens head_dim"]
    value: Float[Tensor, "1 kv_heads tokens head_dim"]
    tables: tuple[Tensor, Tensor] | None
    sites: Mapping[Site, Float[Tensor, "1 _ tokens _"]] = field(default_factory=dict)

    def rotated(self, x: Float[Tensor, "1 heads tokens head_dim"]) -> Float[Tensor, "1 heads tokens head_dim"]:
        """Keys or queries as attention reads them."""
        return x if self.tables is None else rotate(x, *self.tables, self.layer.rotation)

    def decoded(
        self, quantizers: Mapping[Site, Quantizer], sink_tokens: int
    ) -> tuple[Float[Tensor, "1 kv_heads tokens head_dim"], Float[Tensor, "1 kv_heads tokens head_dim"]]:
        """The rotated key and the value after the layer's quantizers; the first `sink_tokens` tokens stay exact."""
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
        context = tuple(u[sink_tokens:] for u in self._context(quantizers, site, x.device))
        return from_rows(torch.cat([rows[:sink_tokens], quantizer.simulate(rows[sink_tokens:], context)]), x)

    def _context(self, quantizers: Mapping[Site, Quantizer], site: Site, device: torch.device) -> Context:
        """What the site is predicted from, found by decoding all sites before it in their order."""
        decoded: dict[Site, Tensor] = {}
        earlier = [other for other in sorted(self.sites) if other < site and other in quantizers]
        for other in earlier if quantizers[site].sources else ():
            quantizer = quantizers[other].to(device)
            context = tuple(decoded[source] for source in quantizer.sources)
            decoded[other] = quantizer.simulate(to_rows(self.sites[other]).to(device), context)
        return tuple(decoded[source] for source in quantizers[site].sources)


@torch.no_grad()
def attention_inputs(
    model: nn.Module, layers: Sequence[AttentionLayer], window: Int64[Tensor, " tokens"]
) -> list[AttentionInputs]:
    """What every layer attends with while the model, as it is, reads one window without padding.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model; it is as it was afterwards.
    layers : Sequence[AttentionLayer]
        Its attention layers.
    window : Int64[Tensor, "tokens"]
        Token ids.
    """
    seen: dict[Site, Tensor] = {}
    tables: dict[int, tuple[Tensor, Tensor]] = {}

    handlers = {site: _keeper(site, seen) for layer in layers for site in _sites(layer)}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(tapped(layers, handlers))
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(_table_keeper(layer, tables), with_kwargs=True)
            stack.callback(hook.remove)
        model(input_ids=window[None].to(next(model.parameters()).device), use_cache=False)
    found, cached = [], {site: x for site, x in seen.items() if site.tensor != "query"}
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
            tables[layer.layer] = layer.tables(position_tables(module, kwargs))

    return keep
