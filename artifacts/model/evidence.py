"""Analysis of the probe: shape, hooks and rotary embedding of an attention module, or the reason it is unsupported."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from artifacts.errors import NothingCached, UnsupportedLayer
from artifacts.model.heads import Heads, nearest
from artifacts.model.hooks import AttentionLayer, Hook
from artifacts.model.rotation import found_rotation, table_frequencies

Role = Literal["key", "value", "query"]

ROLES: tuple[Role, ...] = ("key", "value", "query")
_FUSED = "W?qkv(?:_proj)?|query_key_value|c_attn|kv_proj"


@dataclass
class Evidence:
    """Observations of one attention module during the probe.

    Parameters
    ----------
    module : nn.Module
        The attention module.
    received, sent : dict from str to Tensor
        Input of each projection and norm, and the noise that replaced its output, by child name.
    cached : list of pairs of Tensor
        Keys and values of each `cache.update`.
    called, handed : bool
        True if the module ran, and if it got a cache.
    calls : set of str
        Attributes of the cache that it used, `update` included.
    position_embeddings : object
        Cosines and sines that it got.
    mask : object
        Attention mask that it got.
    failure : str
        Error that stopped the probe before its end; empty without one.
    """

    module: nn.Module
    received: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, Tensor] = field(default_factory=dict)
    cached: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    called: bool = False
    handed: bool = False
    calls: set[str] = field(default_factory=set)
    position_embeddings: Any = None
    mask: Any = None
    failure: str = ""


def projection(module: nn.Module, role: Role) -> str | None:
    """Name of the child that projects keys, values, queries, or all three."""
    return _child(module, rf"(?:W|project_)?{role[0]}(?:{role[1:]})?(?:_proj|_lin)?|{_FUSED}")


def norm(module: nn.Module, role: Role) -> str | None:
    """Name of the child that normalises keys, values or queries."""
    return _child(module, rf"{role[0]}(?:{role[1:]})?_(?:layer_?)?norm")


def text_config(model: nn.Module) -> Any:
    """Configuration of the language model, also inside a multimodal one or a wrapper."""
    configs = (getattr(module, "config", None) for module in model.modules())
    config: Any = next((own for own in configs if own is not None), None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def understand(index: int, name: str, seen: Evidence) -> AttentionLayer:
    """Attention layer that explains the observations.

    Raises
    ------
    UnsupportedLayer
        If the cached tensors are not outputs of its projections or norms, keys with or without rotary embedding.
    """
    key, value = _cached(seen)
    sources: dict[Role, str] = {"key": _source(seen, "key"), "value": _source(seen, "value")}
    held = {role: _heads(child, seen.sent[child], key) for role, child in sources.items()}
    value_heads = _unchanged(held["value"].x, value, sources["value"])
    turning = found_rotation(held["key"].x, key, seen.position_embeddings, sources["key"])
    chosen: dict[Role, list[int]] = {"key": turning.heads, "value": value_heads}
    copies = _copies(chosen)
    chosen = {role: heads[::copies] for role, heads in chosen.items()}
    sources["query"], held["query"], chosen["query"] = _query(seen, key, sources, chosen)
    return AttentionLayer(
        layer=index,
        name=name,
        module=seen.module,
        q_heads=len(chosen["query"]),
        kv_heads=len(chosen["key"]),
        head_dim=key.shape[-1],
        rotation=turning.rotation,
        rotary_dim=turning.rotary_dim,
        sliding_window=_sliding_window(seen.module, index),
        frequencies=table_frequencies(seen.position_embeddings, turning),
        table_order=turning.order,
        copies=copies,
        mask_hides=_mask_hides(seen.mask),
        **{role: _hook(seen, sources[role], held[role], chosen[role]) for role in ROLES},
    )


def _mask_hides(mask: object) -> bool:
    """True for a boolean mask that is true at hidden tokens."""
    # Every token of the probe attends to itself, so the diagonal is all visible: true there means "visible".
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 4:
        return False
    return not mask.diagonal(dim1=-2, dim2=-1).any()


def _cached(seen: Evidence) -> tuple[Tensor, Tensor]:
    if not seen.cached:
        raise nothing_cached(seen)
    key, value = seen.cached[0]
    if len(seen.cached) > 1 or key.ndim != 4 or key.shape != value.shape:
        shapes = [(tuple(key.shape), tuple(value.shape)) for key, value in seen.cached]
        raise UnsupportedLayer(
            f"expected one cache.update with key and value, both batch kv_heads tokens head_dim; got {shapes}"
        )
    if not seen.handed:
        raise UnsupportedLayer("the model gives it no cache: it is an encoder, which never generates")
    return key, value


def running_state(seen: Evidence) -> list[str]:
    """Attributes of the cache that a module with a running state in place of keys and values used."""
    return [] if seen.cached else sorted(call for call in seen.calls if re.search("state|linear_cache", call))


def nothing_cached(seen: Evidence) -> UnsupportedLayer:
    """Error of a module that cached no keys and values."""
    calls = running_state(seen)
    if seen.failure or not calls:
        why = "never calls cache.update: it has no keys and values of its own, but those of another layer or none"
        return UnsupportedLayer(seen.failure or why)
    kind = type(seen.module).__name__
    return NothingCached(f"{kind} has a running state and no keys and values: it calls {', '.join(calls)} of the cache")


def _source(seen: Evidence, role: Role) -> str:
    """Name of the child that returns the tensor in its last form before the rotary embedding."""
    for child in (norm(seen.module, role), projection(seen.module, role)):
        if child and child in seen.sent:
            return child
    raise _no_projection(role)


def _no_projection(role: Role) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"its forward pass calls no {role} projection ({role[0]}_proj or qkv_proj) that returns a tensor"
    )


def _heads(child: str, output: Tensor, key: Tensor) -> Heads:
    _, _, n_tokens, head_dim = key.shape
    found = Heads.of(output, n_tokens, head_dim)
    if found is None:
        raise UnsupportedLayer(
            f"{child} returns {tuple(output.shape)}; expected heads of {head_dim} channels for {n_tokens} tokens"
        )
    return found


def _unchanged(heads: Tensor, value: Tensor, source: str) -> list[int]:
    chosen = nearest(value, heads)
    if not torch.equal(heads[:, chosen], value):
        raise UnsupportedLayer(f"the cached value must be the output of {source}; it is not")
    return chosen


def _copies(chosen: Mapping[Role, Sequence[int]]) -> int:
    """Number of times each head is cached, equal for keys and values."""
    # Grouped-query heads may be repeated before the cache (Falcon): 0, 0, 1, 1 are two heads, two copies each.
    copies = len(chosen["key"]) // len(set(chosen["key"]))
    for role, heads in chosen.items():
        if list(heads) != [head for head in dict.fromkeys(heads) for _ in range(copies)]:
            raise UnsupportedLayer(
                f"expected each {role} head {copies} times in the cache, in order; got heads {list(heads)}"
            )
    return copies


def _query(
    seen: Evidence, key: Tensor, sources: Mapping[Role, str], chosen: Mapping[Role, list[int]]
) -> tuple[str, Heads, list[int]]:
    """Source of the queries: a child of their own, or the heads that keys and values leave in a fused projection."""
    child = _source(seen, "query")
    held = _heads(child, seen.sent[child], key)
    taken = {head for role, source in sources.items() if source == child for head in chosen[role]}
    heads = [head for head in range(len(held)) if head not in taken]
    if not heads:
        raise _no_projection("query")
    kv_heads = key.shape[1]
    groups = getattr(seen.module, "num_key_value_groups", max(1, len(heads) // kv_heads))
    if len(heads) != groups * kv_heads:
        raise UnsupportedLayer(
            f"{child} returns {tuple(seen.sent[child].shape)}; expected {groups} query heads of {key.shape[-1]} "
            f"channels for each of {kv_heads} key heads, and nothing else but keys and values"
        )
    return child, held, heads


def _hook(seen: Evidence, child: str, held: Heads, chosen: Sequence[int]) -> Hook:
    hook = held.hook(seen.module.get_submodule(child), chosen)
    if hook is None:
        raise UnsupportedLayer(
            f"{child} returns {len(held)} heads, of which {list(chosen)} are used; expected all of them"
        )
    return hook


def _sliding_window(module: nn.Module, index: int) -> int | None:
    config = text_config(module)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] != "sliding_attention":
        return None
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return window if isinstance(window, int) and window > 0 else None


def _child(module: nn.Module, pattern: str) -> str | None:
    return next((name for name, _ in module.named_children() if re.fullmatch(pattern, name)), None)
