"""Reading and replacing the tensors of attention layers while a model runs."""

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
from artifacts.model.transformers_release import exchange_cache
from artifacts.sites import Site

Layout = Literal["flat", "tokens_first", "heads_first"]
Handler = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Hook:
    """Where a tensor leaves a module.

    Parameters
    ----------
    module : nn.Module
        The projection, or the norm after it, whose output holds the tensor.
    columns : tuple of slice, or None
        The tensor's share of the last axis of a fused projection, head after head; None if the output is the tensor
        alone.
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
        """The tensor inside a module's output; a view, unless its columns are in several places."""
        part = output if self.columns is None else _joined([output[..., columns] for columns in self.columns])
        if self.layout == "flat":
            part = part.unflatten(-1, (self.heads, self.head_dim))
        return part if self.layout == "heads_first" else part.transpose(1, 2)

    def write(self, output: Tensor, x: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
        """A module's output with `x` in the tensor's place; `output` itself is left alone."""
        part = x if self.layout == "heads_first" else x.transpose(1, 2).contiguous()
        if self.layout == "flat":
            part = part.flatten(-2)
        if self.columns is None:
            return part
        whole = output.clone()
        widths = [columns.stop - columns.start for columns in self.columns]
        for columns, piece in zip(self.columns, part.split(widths, dim=-1), strict=True):
            whole[..., columns] = piece
        return whole


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=-1)


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention layer: its shape, and where its keys, values and queries can be reached.

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
        Where each is last seen before rotation.
    rotation : {'half', 'interleaved', 'none'}
        Which channels the rotary embedding pairs: (d, d + rotary_dim / 2), (2d, 2d + 1), or no rotation.
    rotary_dim : int
        Leading channels of each head that rotate; 0 without rotation.
    sliding_window : int or None
        Number of tokens that a query reaches back; None if it sees all.
    frequencies : tuple of float
        By how many radians a position turns each rotary pair, in the order of the pairs' first channels; empty without
        rotation.
    table_order : {'as_read', 'halves', 'once', 'sines_first'}
        How the model lays out its cosines and sines: as `rotate` reads them, all frequencies twice over
        although pairs are interleaved (GLM), each frequency once (gpt-oss), or that with the sines first (GPT-J from
        transformers 5.24). See `tables`.
    mask_hides : bool
        Whether a boolean mask is true where it hides (MPT), and not where it shows.
    copies : int
        How often the module itself repeats each key and value head before it caches them (Falcon); 1 elsewhere.
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
        """The (cos, sin) that `rotate` reads, from the model's own `position_embeddings`."""
        cos, sin = (
            spread(table, self.table_order, self.rotation) for table in cos_sin(position_embeddings, self.table_order)
        )
        return cos, sin


@contextmanager
def hooked(layers: Sequence[AttentionLayer], handlers: Mapping[Site, Handler]) -> Iterator[None]:
    """Call a handler with each site's tensor whenever the model runs inside the context.

    A handler gets "batch heads tokens head_dim". What it returns goes on in place of the tensor, both into the cache
    and into attention; None leaves everything as it is. Contexts may be nested: the outer one's handlers come first.
    Compiled modules run as they are written meanwhile. On leaving, also by an exception, no hook remains.

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
    """Modules that were compiled run as they are written: compiled code never calls hooks that are added later."""
    with torch.compiler.set_stance("force_eager"):
        yield


def check_seen(model: nn.Module, missing: Sequence[Site]) -> None:
    """A forward pass that went by some sites is told.

    Raises
    ------
    UnsupportedModelError
        If any is missing.
    """
    if missing:
        others = f" and of {len(missing) - 1} other sites" if len(missing) > 1 else ""
        raise UnsupportedModelError(
            f"{type(model).__name__}: it ran, and nothing was seen of {missing[0]}{others}: its hooks were not called, "
            "as where a graph was captured before. Run the module as it was written: model._orig_mod of a compiled one."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and every module back into its own mode afterwards."""
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
    """Pass keys and values through `replace` on their way into the cache, also when there is no cache."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return exchange_cache(module, (args, kwargs), lambda cache: _InterceptedCache(cache, replace))

    # Prepended, so that the outer of two nested contexts wraps the inner one's wrapper and has its turn first.
    return attention.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


class _InterceptedCache:
    """A model's cache, or none, with something done to what comes in."""

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
        """Tokens before this step."""
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
        replacement = _handled(site, handler, key[:, :: layer.copies])
        return (key if replacement is None else replacement.repeat_interleave(layer.copies, dim=1)), value

    return intercept_cache(layer.module, replace)


def _on_hook(hook: Hook, site: Site, handler: Handler) -> RemovableHandle:
    def handle(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        replacement = _handled(site, handler, hook.read(output))
        return None if replacement is None else hook.write(output, replacement)

    return hook.module.register_forward_hook(handle)


def _observe_rotated_query(layer: AttentionLayer, site: Site, handler: Handler) -> Iterator[RemovableHandle]:
    position_embeddings: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        position_embeddings[:] = position_tables(module, kwargs) or ()

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
