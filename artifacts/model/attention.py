"""Attention layers of a transformers model, found by structure and verified by one small forward pass.

With its helpers `probe`, `evidence` and `hooks`, this is all that depends on the layout of models in transformers 5.17
to 5.24. Child modules are found by name; then their outputs are replaced with noise, and the cache must receive that
noise, rotated. Class names play no part.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from artifacts.errors import NothingCached, UnsupportedLayer, UnsupportedModelError
from artifacts.model.evidence import Evidence, nothing_cached, projection, running_state, text_config, understand
from artifacts.model.hooks import AttentionLayer, Hook, hooked
from artifacts.model.probe import Probed, probe
from artifacts.model.rope import Rotation, rotate
from artifacts.model.transformers_release import cache_keyword, check_release

__all__ = ["AttentionLayer", "Hook", "LayerReport", "Rotation", "attention_layers", "hooked", "rotate", "site_table"]

_ATTENTION = ("attention", "full_attention", "sliding_attention", "chunked_attention", "hybrid")
"""Kinds of layers that must have keys and values, as transformers names them."""


@dataclass(frozen=True)
class LayerReport:
    """Result of the probe for one layer of a model.

    Parameters
    ----------
    layer : int
        Index of the layer, from 0.
    name : str
        Path of the module that updates the cache of the layer; empty if there is none.
    status : {'applied', 'without', 'skipped'}
        'applied' if the keys and values of the layer can be hooked, 'without' if it keeps none of its own.
    why : str
        Reason for 'without' and 'skipped'; empty otherwise.
    kv_heads, head_dim : int or None
        Shape of keys and values; None unless 'applied'.
    hooks : tuple of str
        Child modules that are hooked for key, value and query, with the columns in a fused projection.
    """

    layer: int
    name: str
    status: Literal["applied", "without", "skipped"]
    why: str = ""
    kv_heads: int | None = None
    head_dim: int | None = None
    hooks: tuple[str, ...] = ()


def attention_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Attention layers of a model, in order; without those that keep no keys and values of their own.

    Runs the model once on a few tokens and leaves it unchanged. Left out are layers with a running state, as in hybrids
    of Mamba and attention, and layers that read the keys and values of another.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, or its decoder.

    Raises
    ------
    UnsupportedModelError
        If no layer keeps keys and values, or a layer caches anything other than the outputs of its projections or
        norms (keys with or without rotary embedding). Names the first such layer and the reason.
    UnsupportedReleaseError
        If the installed release of transformers is not supported.
    """
    found = _survey(model)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected attention modules, with an integer layer_idx and a forward that takes a "
            "cache; got none. Pass a causal language model of transformers, or its decoder."
        )
    layers = tuple(layer for layer in found if isinstance(layer, AttentionLayer))
    others = [layer for layer in found if isinstance(layer, LayerReport)]
    skipped = [layer for layer in others if layer.status == "skipped"]
    for layer in skipped or (others if not layers else ()):
        name = f" ({layer.name})" if layer.name else ""
        raise UnsupportedModelError(
            f"layers.{layer.layer}{name}: {layer.why}; `calibrate MODEL --list-sites` lists all layers"
        )
    return layers


def site_table(model: nn.Module) -> list[LayerReport]:
    """Reports of all layers: hooked modules of supported ones, reasons for the others.

    Never raises for a layer that is not supported. A model without a cache has no rows.
    """
    return [layer if isinstance(layer, LayerReport) else _report(layer) for layer in _survey(model)]


def _survey(model: nn.Module) -> list[AttentionLayer | LayerReport]:
    check_release()
    mixers = _mixers(model)
    if not mixers:
        return []
    evidence = probe(model, [module for modules in mixers.values() for module in modules.values()])
    config = text_config(model)
    # Layers without any module that takes a cache are known from the configuration only.
    n_layers = max(max(mixers) + 1, getattr(config, "decoder_layers", getattr(config, "num_hidden_layers", 0)))
    return [_judge(layer, mixers.get(layer, {}), evidence, _kind(config, layer)) for layer in range(n_layers)]


def _mixers(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """Modules with a layer index and a cache argument: module by path, by layer.

    Of nested ones the outermost that projects keys itself, otherwise the innermost.
    """
    # A decoder layer passes the cache on to its attention: both have an index and the argument. Dropping everything
    # inside an attention, then everything with something inside, leaves one module of each nest.
    found = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules() if _takes_cache(module)}
    attention = {name for name, module in found.items() if projection(module, "key") or _latent(module)}
    found = {name: module for name, module in found.items() if attention.isdisjoint(_ancestors(name))}
    outer = {ancestor for name in found for ancestor in _ancestors(name)}
    by_layer: dict[int, dict[str, nn.Module]] = {}
    for name in found.keys() - outer:
        by_layer.setdefault(_layer_index(found[name]), {})[name] = found[name]
    return by_layer


def _ancestors(name: str) -> set[str]:
    return {name[: dot.start()] for dot in re.finditer(r"\.", name)}


def _takes_cache(module: nn.Module) -> bool:
    return _layer_index(module) >= 0 and cache_keyword(module) is not None


def _layer_index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    return index if isinstance(index, int) else -1


def _kind(config: Any, layer: int) -> str:
    """Kind of a layer by the configuration of a hybrid; empty where it tells none."""
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or ()
    return str(kinds[layer]) if layer < len(kinds) else ""


def _judge(index: int, modules: Mapping[str, nn.Module], evidence: Probed, kind: str) -> AttentionLayer | LayerReport:
    name = " + ".join(sorted(modules))
    try:
        seen = _only_one(modules, evidence.of, kind)
        name = next(name for name, module in modules.items() if module is seen.module)
        _check_projects_keys(seen)
        return understand(index, name, seen)
    except NothingCached as error:
        if index not in evidence.filled:
            return LayerReport(index, name, "without", str(error))
        return LayerReport(index, name, "skipped", "its keys and values come from a module that has no layer_idx")
    except UnsupportedLayer as error:
        return LayerReport(index, name, "skipped", str(error))


def _only_one(modules: Mapping[str, nn.Module], evidence: Mapping[nn.Module, Evidence], kind: str) -> Evidence:
    """Evidence of the one module of a layer that ran; a decoder used alone never calls its cross-attention."""
    seen = [evidence[module] for module in modules.values()]
    if kind and kind not in _ATTENTION and not any(each.cached or running_state(each) or each.failure for each in seen):
        raise NothingCached(f"{kind} by the model's configuration, which keeps no keys and values")
    seen = seen if len(seen) == 1 else [each for each in seen if each.called or each.failure]
    # Beside its attention a layer may keep the running state of a convolution or a recurrence.
    seen = [each for each in seen if not running_state(each)] or seen[:1]
    if len(seen) != 1:
        raise UnsupportedLayer(f"expected one module that keeps a cache under this layer_idx; got {len(seen)}")
    return seen[0]


def _check_projects_keys(seen: Evidence) -> None:
    latent = _latent(seen.module)
    if latent is not None:
        raise UnsupportedLayer(f"multi-head latent attention ({latent}) caches latents, not keys and values")
    if projection(seen.module, "key"):
        return
    if projection(seen.module, "query"):
        raise NothingCached("projects queries but no keys: it reads the keys and values of another layer")
    if seen.cached:
        children = ", ".join(name for name, _ in seen.module.named_children())
        raise UnsupportedLayer(
            f"expected a child named as a projection of keys (k_proj, key, qkv_proj, c_attn); got {children}"
        )
    raise nothing_cached(seen)


def _latent(module: nn.Module) -> str | None:
    return next((name for name, _ in module.named_children() if name.startswith("kv_a_proj")), None)


def _report(layer: AttentionLayer) -> LayerReport:
    names = {child: name for name, child in layer.module.named_children()}
    hooks = tuple(_describe(hook, names[hook.module]) for hook in (layer.key, layer.value, layer.query))
    return LayerReport(layer.layer, layer.name, "applied", "", layer.kv_heads, layer.head_dim, hooks)


def _describe(hook: Hook, name: str) -> str:
    columns = [f"{columns.start}:{columns.stop}" for columns in hook.columns or ()]
    return f"{name}[{', '.join(columns)}]" if columns else name
