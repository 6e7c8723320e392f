"""Reading what an attention module did during the probe: its shape, its taps and its rotation, or why it is refused."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from artifacts.rope import Rotation, TableOrder, rotate, spread
from artifacts.taps import AttentionLayer, Layout, Tap

Role = Literal["key", "value", "query"]

ROLES: tuple[Role, ...] = ("key", "value", "query")
_FUSED = "qkv_proj|Wqkv"
_READINGS: tuple[tuple[Rotation, TableOrder], ...] = (
    ("half", "as_read"),
    ("interleaved", "as_read"),
    ("interleaved", "halves"),
    ("half", "once"),
    ("interleaved", "once"),
)


class Refusal(Exception):
    """Why a layer cannot be handled."""


@dataclass
class Evidence:
    """What one attention module did during the probe.

    Parameters
    ----------
    module : nn.Module
        The attention module.
    received, sent : dict from str to Tensor
        Input of each projection and norm, and the noise that took the place of its output, by child name.
    cached : list of pairs of Tensor
        Keys and values of each `cache.update`.
    position_embeddings : object
        What the module was called with.
    failure : str
        Why the probe stopped before its end; empty if it did not.
    """

    module: nn.Module
    received: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, Tensor] = field(default_factory=dict)
    cached: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    position_embeddings: Any = None
    failure: str = ""


@dataclass(frozen=True)
class _Shape:
    """Sizes seen in the probe."""

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int

    def heads(self, role: Role) -> int:
        return self.q_heads if role == "query" else self.kv_heads

    def columns(self, role: Role) -> slice:
        first = {"query": 0, "key": self.q_heads, "value": self.q_heads + self.kv_heads}[role]
        return slice(first * self.head_dim, (first + self.heads(role)) * self.head_dim)


def projection(module: nn.Module, role: Role) -> str | None:
    """Name of the child that projects keys, values, queries, or all three."""
    return _child(module, rf"{role[0]}(?:{role[1:]})?_proj|{_FUSED}")


def norm(module: nn.Module, role: Role) -> str | None:
    """Name of the child that normalises keys, values or queries."""
    return _child(module, rf"{role[0]}(?:{role[1:]})?_(?:layer_?)?norm")


def text_config(model: nn.Module) -> Any:
    """Configuration of the language model, also inside a multimodal one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def understand(index: int, name: str, seen: Evidence) -> AttentionLayer:
    """The attention layer whose behaviour `seen` is.

    Raises
    ------
    Refusal
        If what it caches is not what its projections or norms return, the keys rotated or not.
    """
    key, value = _cached(seen)
    shape = _shape(seen, key)
    _refuse_late_norm(seen, shape)
    sources = {role: _source(seen, role) for role in ROLES}
    taps = {role: _tap(seen, shape, role, child, seen.sent[child]) for role, child in sources.items()}
    read = {role: tap.read(seen.sent[sources[role]]) for role, tap in taps.items()}
    if not torch.equal(read["value"], value):
        raise Refusal(f"the cached value is not what {sources['value']} returns")
    rotation, order, rotary_dim = _rotation(read["key"], key, seen.position_embeddings, sources["key"])
    return AttentionLayer(
        layer=index,
        name=name,
        module=seen.module,
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotation=rotation,
        rotary_dim=rotary_dim,
        sliding_window=_sliding_window(seen.module, index),
        frequencies=_frequencies(seen.position_embeddings, rotation, order),
        table_order=order,
        **taps,
    )


def _cached(seen: Evidence) -> tuple[Tensor, Tensor]:
    if not seen.cached:
        raise Refusal(seen.failure or "never calls cache.update; it uses the keys and values of another layer")
    key, value = seen.cached[0]
    if len(seen.cached) > 1 or key.ndim != 4 or key.shape != value.shape:
        shapes = [(tuple(key.shape), tuple(value.shape)) for key, value in seen.cached]
        raise Refusal(
            f"expected one cache.update with key and value, both batch kv_heads tokens head_dim; got {shapes}"
        )
    return key, value


def _source(seen: Evidence, role: Role) -> str:
    """The child that returns a tensor's last form before rotation."""
    for child in (norm(seen.module, role), projection(seen.module, role)):
        if child and child in seen.sent:
            return child
    raise Refusal(f"its forward pass calls no {role} projection ({role[0]}_proj or qkv_proj)")


def _shape(seen: Evidence, key: Tensor) -> _Shape:
    _, kv_heads, tokens, head_dim = key.shape
    child = _source(seen, "query")
    heads, rest = divmod(seen.sent[child].numel(), tokens * head_dim)
    q_heads = heads - 2 * kv_heads if re.fullmatch(_FUSED, child) else heads
    groups = getattr(seen.module, "num_key_value_groups", q_heads // kv_heads)
    if rest or q_heads != groups * kv_heads:
        raise Refusal(
            f"{child} returns {tuple(seen.sent[child].shape)}; expected {groups} query heads of {head_dim} channels "
            f"for each of {kv_heads} key heads, and nothing else but keys and values"
        )
    return _Shape(tokens, q_heads, kv_heads, head_dim)


def _tap(seen: Evidence, shape: _Shape, role: Role, child: str, output: Tensor) -> Tap:
    columns = shape.columns(role) if re.fullmatch(_FUSED, child) else None
    heads, tokens, head_dim = shape.heads(role), shape.tokens, shape.head_dim
    layouts: dict[tuple[int, ...], Layout] = {
        (1, tokens, heads * head_dim): "flat",
        (1, tokens, heads, head_dim): "tokens_first",
        (1, heads, tokens, head_dim): "heads_first",
    }
    found = tuple(output[..., columns or slice(None)].shape)
    if found not in layouts:
        raise Refusal(f"{child} holds a {role} of shape {found}; expected one of {list(layouts)}")
    return Tap(seen.module.get_submodule(child), columns, heads, head_dim, layouts[found])


def _refuse_late_norm(seen: Evidence, shape: _Shape) -> None:
    before, after = projection(seen.module, "key"), norm(seen.module, "key")
    if before not in seen.sent or after not in seen.sent:
        return
    left = _tap(seen, shape, "key", before, seen.sent[before]).read(seen.sent[before])
    arrived = _tap(seen, shape, "key", after, seen.received[after]).read(seen.received[after])
    if not torch.equal(left, arrived):
        raise Refusal(
            "a norm follows the rotary embedding, so what is cached is not the rotation of any projection output"
        )


def _rotation(x: Tensor, cached: Tensor, position_embeddings: object, source: str) -> tuple[Rotation, TableOrder, int]:
    tables = _cos_sin(position_embeddings)
    if _agree(cached, x, x):
        return "none", "as_read", 0
    for rotation, order in _READINGS if tables else ():
        cos, sin = (spread(table.double(), order, rotation) for table in tables)
        pairs, rest = divmod(cos.shape[-1], 2)
        fits = not rest and 2 * pairs <= x.shape[-1]
        if fits and _agree(cached, rotate(x.double(), cos, sin, rotation), x):
            return rotation, order, 2 * pairs
    raise Refusal(f"the cached key is not what {source} returns, rotated or not")


def _frequencies(position_embeddings: object, rotation: Rotation, order: TableOrder) -> tuple[float, ...]:
    """Radians per position of each rotary pair, read off the second position of the model's own tables."""
    if rotation == "none":
        return ()
    cos, sin = (spread(table[0, 1].double(), order, rotation) for table in _cos_sin(position_embeddings))
    angles = torch.atan2(sin, cos)
    pairs: list[float] = (angles[: len(angles) // 2] if rotation == "half" else angles[::2]).tolist()
    return tuple(pairs)


def _cos_sin(position_embeddings: object) -> tuple[Tensor, ...]:
    """The model's tables, or nothing where positions are not rotated in."""
    match position_embeddings:
        case None:
            return ()
        case [Tensor(ndim=3) as cos, Tensor(ndim=3) as sin] if cos.is_floating_point():
            return cos, sin
    raise Refusal("position_embeddings is not a pair (cos, sin) of tensors batch tokens rotary_dim")


def _agree(cached: Tensor, expected: Tensor, x: Tensor) -> bool:
    """Whether `cached` is `expected` up to the rounding of x cos and y sin, where |y sin| <= |expected| + |x cos|."""
    bound = 4 * torch.finfo(cached.dtype).eps * (2 * x.double().abs() + expected.double().abs())
    return bool(((cached.double() - expected.double()).abs() <= bound).all())


def _sliding_window(module: nn.Module, index: int) -> int | None:
    config = text_config(module)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] != "sliding_attention":
        return None
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return window if isinstance(window, int) and window > 0 else None


def _child(module: nn.Module, pattern: str) -> str | None:
    return next((name for name, _ in module.named_children() if re.fullmatch(pattern, name)), None)
