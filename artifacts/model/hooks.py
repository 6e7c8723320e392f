"""Hooks that read and replace the tensors of attention layers while a model runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from artifacts.errors import MismatchError, UnsupportedModelError
from artifacts.model.rope import Rotation, TableOrder, cos_sin, position_tables, rotate, spread
from artifacts.model.transformers_release import exchange_cache, named_arguments
from artifacts.sites import Site

Layout = Literal["flat", "tokens_first", "heads_first"]
Handler = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Hook:
    """Location of a tensor in the output of a module.

    Parameters
    ----------
    module : nn.Module
        The projection, or the norm after it, whose output holds the tensor.
    columns : tuple of slice, or None
        Columns of the tensor in a fused projection, head after head; None if the output is the tensor alone.
    heads, head_dim : int
        Shape of the tensor.
    layout : {'flat', 'tokens_first', 'heads_first'}
        Axes of the output: batch tokens channels, batch tokens heads head_dim, or batch heads tokens head_dim.
    """

    module: nn.Module
    columns: tuple[slice, ...] | None
    heads: int
    head_dim: int
    layout: Layout

    def read(self, output: Tensor) -> Float[Tensor, "batch heads tokens head_dim"]:
        """The tensor in a module's output; a view, unless it has several column slices."""
        part = output if self.columns is None else _joined([output[..., columns] for columns in self.columns])
        if self.layout == "flat":
            part = part.unflatten(-1, (self.heads, self.head_dim))
        return part if self.layout == "heads_first" else part.transpose(1, 2)

    def write(self, output: Tensor, x: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
        """Output of a module with the tensor replaced by `x`; `output` itself is not changed."""
        part = x if self.layout == "heads_first" else x.transpose(1, 2).contiguous()
        if self.layout == "flat":
            part = part.flatten(-2)
        if self.columns is None:
            return part
        # A fused projection holds other tensors too, and the output may be saved for a backward pass: write to a copy.
        whole = output.clone()
        widths = [columns.stop - columns.start for columns in self.columns]
        for columns, piece in zip(self.columns, part.split(widths, dim=-1), strict=True):
            whole[..., columns] = piece
        return whole


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=-1)


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """Attention layer: shape, rotary embedding, and hooks on its keys, values and queries.

    Parameters
    ----------
    layer : int
        Index of the layer, from 0; the same as in `Site.layer`.
    name : str
        Path of the attention module in the model.
    module : nn.Module
        The attention module.
    q_heads, kv_heads, head_dim : int
        Number of query heads, of key and value heads, and channels of each.
    query, key, value : Hook
        Last location of each before the rotary embedding.
    rotation : {'half', 'interleaved', 'none'}
        Channel pairs of the rotary embedding: (d, d + rotary_dim / 2), (2d, 2d + 1), or no rotation.
    rotary_dim : int
        Leading channels of each head that rotate; 0 without rotation.
    sliding_window : int or None
        Size of the attention window in tokens; None for full attention.
    frequencies : tuple of float
        Radians per position of each rotary pair, in the order of the pairs' first channels; empty without rotation.
    table_order : {'as_read', 'halves', 'once', 'sines_first'}
        Layout of the model's cosines and sines: as `rotate` reads them, all frequencies twice in a row although pairs
        are interleaved (GLM), each frequency once (gpt-oss), or once with the sines first (GPT-J from transformers
        5.24). See `tables`.
    mask_hides : bool
        True if a boolean mask is true at hidden tokens (MPT) rather than at visible ones.
    copies : int
        Number of times the module repeats each key and value head before the cache (Falcon); 1 elsewhere.
    """

    layer: int
    name: str
    module: nn.Module
    q_heads: int
    kv_heads: int
    head_dim: int
    query: Hook
    key: Hook
    value: Hook
    rotation: Rotation
    rotary_dim: int
    sliding_window: int | None
    frequencies: tuple[float, ...] = ()
    table_order: TableOrder = "as_read"
    mask_hides: bool = False
    copies: int = 1

    @property
    def channels(self) -> int:
        """Channels of a key or a value over all heads."""
        return self.kv_heads * self.head_dim

    def tables(self, position_embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tables (cos, sin) in the layout of `rotate`, from the model's own `position_embeddings`."""
        cos, sin = (
            spread(table, self.table_order, self.rotation) for table in cos_sin(position_embeddings, self.table_order)
        )
        return cos, sin


@contextmanager
def hooked(layers: Sequence[AttentionLayer], handlers: Mapping[Site, Handler]) -> Iterator[None]:
    """Calls a handler with the tensor of each site whenever the model runs inside the context.

    A handler gets "batch heads tokens head_dim". Its result replaces the tensor in the cache and in attention; None
    leaves the tensor unchanged. Contexts may be nested: handlers of the outer one run first. Compiled modules run
    eagerly inside. All hooks are removed on exit, also after an exception.

    Parameters
    ----------
    layers : sequence of AttentionLayer
        From `attention_layers(model)`.
    handlers : mapping from Site to callable
        A handler of `query.post_rope` can only observe.

    Raises
    ------
    MismatchError
        If a site names a layer that is not in `layers`, or a handler changes shape, dtype or device.
    TypeError
        If a handler of `query.post_rope` returns something.
    """
    by_index = {layer.layer: layer for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for site, handler in handlers.items():
            if site.layer not in by_index:
                raise MismatchError(
                    f"{site}: expected one of the layers {sorted(by_index)}; got layer {site.layer}. "
                    "Was the artifact made for another model?"
                )
            for handle in _register(by_index[site.layer], site, handler):
                stack.callback(handle.remove)
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs compiled modules eagerly: compiled code does not call hooks that were added later."""
    with torch.compiler.set_stance("force_eager"):
        yield


def check_seen(model: nn.Module, missing: Sequence[Site]) -> None:
    """Checks that a forward pass called the hooks of all sites.

    Raises
    ------
    UnsupportedModelError
        If any site is missing.
    """
    if missing:
        others = f" and of {len(missing) - 1} other sites" if len(missing) > 1 else ""
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected calls of all hooks; got none for {missing[0]}{others}. A graph captured "
            "before does not call them: run the eager module, which is model._orig_mod of a compiled one."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode and restores the mode of every module on exit."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def intercept_cache(
    attention: nn.Module, replace: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> RemovableHandle:
    """Passes keys and values through `replace` on their way into the cache, also when there is no cache."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return exchange_cache(module, (args, kwargs), lambda cache: _InterceptedCache(cache, replace))

    # Prepended, so that the outer of two nested contexts wraps the inner one's wrapper and has its turn first.
    return attention.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


class _InterceptedCache:
    """Cache proxy that replaces keys and values before they are stored; works without a cache too."""

    def __init__(self, cache: Any, replace: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._cache = getattr(cache, "self_attention_cache", cache)  # a decoder may keep another for what it reads
        self._replace = replace

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self._replace(key_states, value_states)
        if self._cache is None:
            return key, value
        updated: tuple[Tensor, Tensor] = self._cache.update(key, value, layer_idx, *args, **kwargs)
        return updated

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens."""
        return 0 if self._cache is None else int(self._cache.get_seq_length(layer_idx))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _register(layer: AttentionLayer, site: Site, handler: Handler) -> Iterator[RemovableHandle]:
    match site.tensor, site.stage:
        case "key", "post_rope":
            yield _on_cached_key(layer, site, handler)
        case "query", "post_rope":
            yield from _observe_rotated_query(layer, site, handler)
        case _:
            hooks = {"key": layer.key, "value": layer.value, "query": layer.query}
            yield _on_hook(hooks[site.tensor], site, handler)


def _on_cached_key(layer: AttentionLayer, site: Site, handler: Handler) -> RemovableHandle:
    def replace(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Copies of a head are adjacent in the cache: every `copies`-th head is one key head.
        replacement = _handled(site, handler, key[:, :: layer.copies])
        return (key if replacement is None else replacement.repeat_interleave(layer.copies, dim=1)), value

    return intercept_cache(layer.module, replace)


def _on_hook(hook: Hook, site: Site, handler: Handler) -> RemovableHandle:
    def handle(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        replacement = _handled(site, handler, hook.read(output))
        return None if replacement is None else hook.write(output, replacement)

    return hook.module.register_forward_hook(handle)


def _observe_rotated_query(layer: AttentionLayer, site: Site, handler: Handler) -> Iterator[RemovableHandle]:
    # Queries are rotated within the forward of the module, out of reach of hooks: rotate a copy by the call's tables.
    position_embeddings: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        position_embeddings[:] = position_tables(module, named_arguments(module, args, kwargs)) or ()

    def observe(x: Tensor) -> None:
        rotated = x if layer.rotation == "none" else rotate(x, *layer.tables(position_embeddings), layer.rotation)
        if handler(rotated) is not None:
            raise TypeError(f"{site}: a handler must return None here; got a value. Replace query.pre_rope instead")

    yield layer.module.register_forward_pre_hook(note, with_kwargs=True)
    yield _on_hook(layer.query, site, observe)


def _handled(site: Site, handler: Handler, x: Tensor) -> Tensor | None:
    replacement = handler(x)
    if replacement is None:
        return None
    if (replacement.shape, replacement.dtype, replacement.device) != (x.shape, x.dtype, x.device):
        raise MismatchError(
            f"{site}: expected a handler that keeps {tuple(x.shape)}, {x.dtype}, {x.device}; "
            f"got {tuple(replacement.shape)}, {replacement.dtype}, {replacement.device}"
        )
    return replacement
