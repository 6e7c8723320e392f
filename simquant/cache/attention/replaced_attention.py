"""Replacement of a model's attention function through the attention and mask interfaces of transformers (5.17 to 5.24).

Both interfaces are registered: with the attention interface alone transformers makes no mask, and attention is silently
not causal.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from artifacts.errors import MismatchError, UnsupportedModelError
from artifacts.model.transformers_release import cache_keyword
from simquant.cache.attention.block_attention import Scoring

Handler = Callable[[Tensor, Tensor, Tensor, Bool[Tensor, "batch queries tokens"], Scoring], Tensor]
"""Attention function of query, key and value "batch heads tokens head_dim", mask of visible tokens, and scoring."""

_NAME = "kvgauge"
_HANDLERS: dict[nn.Module, Handler] = {}
_REPLACED: dict[int, tuple[str | None, int]] = {}
"""Implementation chosen before, and number of contexts that replace it, by the id of a configuration."""


@contextmanager
def attention_replaced(model: nn.Module, handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Context in which attention modules of a model compute attention by their handlers.

    Attention of other modules, for instance of a vision tower, is unchanged. The model is restored on exit, also after
    an exception.

    Raises
    ------
    MismatchError
        If the model is inside such a context already.
    UnsupportedModelError
        If an attention module does not look its attention function up by name; in a forward pass, if a module does not
        call the function exactly once.
    """
    if not _HANDLERS.keys().isdisjoint(handlers):
        raise MismatchError(
            f"{type(model).__name__}: its attention function is replaced already: contexts of packed_cache and "
            "decode_exact do not nest. Leave the outer context first; one context can make several caches."
        )
    # transformers looks the attention function up by config._attn_implementation in every forward pass, and its mask
    # function under the same name: registering both and changing the name in the configurations replaces no code.
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    configs = _configs(model, handlers)
    with ExitStack() as stack:
        for module, handler in handlers.items():
            watched = _Watched(module, handler)
            _HANDLERS[module] = watched
            stack.callback(_HANDLERS.pop, module)
            stack.callback(module.register_forward_pre_hook(watched.before).remove)
            stack.callback(module.register_forward_hook(watched.after).remove)
        # Without a handler of its own, a layer would attend to the last step alone of the keys of another.
        for module in model.modules():
            if module not in handlers and cache_keyword(module) is not None:
                _HANDLERS[module] = _refuse
                stack.callback(_HANDLERS.pop, module)
        for config in configs:
            _replace(config)
            stack.callback(_put_back, config)
        yield


def _refuse(*_: Any) -> Tensor:
    raise UnsupportedModelError(
        "expected layers that read keys and values of their own; got one that reads those of another. It cannot read a "
        "packed cache. Use the protocol 'full'."
    )


def _replace(config: Any) -> None:
    """Selects the registered attention in a configuration, and counts the contexts that do so."""
    # Models may share a configuration object: the first context notes its implementation, the last one restores it.
    before, n_contexts = _REPLACED.get(id(config), (config._attn_implementation_internal, 0))
    _REPLACED[id(config)] = before, n_contexts + 1
    config._attn_implementation_internal = _NAME


def _put_back(config: Any) -> None:
    before, n_contexts = _REPLACED.pop(id(config))
    if n_contexts > 1:
        _REPLACED[id(config)] = before, n_contexts - 1
    else:
        config._attn_implementation_internal = before


class _Watched:
    """Handler that must be called exactly once in each forward pass of its module."""

    def __init__(self, module: nn.Module, handler: Handler) -> None:
        self._module, self._handler, self._n_calls = module, handler, 0

    def __call__(self, *args: Any) -> Tensor:
        self._n_calls += 1
        if self._n_calls > 1:
            raise self._refusal("calls its attention function more than once")
        return self._handler(*args)

    def before(self, *_: Any) -> None:
        """Pre-forward hook of the module."""
        self._n_calls = 0

    def after(self, *_: Any) -> None:
        """Forward hook of the module."""
        if not self._n_calls:
            raise self._refusal("did not call its attention function")

    def _refusal(self, fault: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{_who(self._module)} {fault}; expected one call in a forward pass. It cannot read a packed cache. "
            "Use the protocol 'full'."
        )


def check_handed(module: nn.Module, cached: tuple[Tensor, Tensor] | None, handed: tuple[Tensor, Tensor]) -> None:
    """Check that attention is given the keys and values that the cache returned, unchanged.

    Raises
    ------
    UnsupportedModelError
        If it is given others: the packed cache cannot apply the module's change to its older tokens.
    """
    # As a rule the tensors are identical objects; copies are compared by value.
    for name, own, other in zip(("keys", "values"), cached or (None, None), handed, strict=True):
        if own is not other and not (own is not None and _equal(own, other)):
            got = "nothing" if own is None else tuple(own.shape)
            raise UnsupportedModelError(
                f"{_who(module)} attends to other {name} than it caches: expected those that the cache gave back, of "
                f"shape {got}; got others, of shape {tuple(other.shape)}. It cannot read a packed cache; use the "
                "protocol 'full'."
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device) and torch.equal(one, other)


def _who(module: nn.Module) -> str:
    return f"layers.{getattr(module, 'layer_idx', '?')}: {type(module).__name__}"


def _configs(model: nn.Module, modules: Iterable[nn.Module]) -> list[Any]:
    """Configurations that select the attention function of these modules, and the masks of the models around them."""
    # A model makes the masks of a decoder inside it by its own configuration or by the text part of it.
    chosen, found = set(modules), []
    for module in chosen:
        if not hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            raise UnsupportedModelError(
                f"{type(model).__name__}: {type(module).__name__} does not take its attention function from "
                "config._attn_implementation, so that it cannot read a packed cache. Use the protocol 'full'."
            )
        found.append(module.config)
    for around in model.modules():
        if isinstance(around, PreTrainedModel) and not chosen.isdisjoint(around.modules()):
            config: Any = around.config
            found += [config, config.get_text_config(decoder=True)]
    return list({id(config): config for config in found}.values())


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if module not in _HANDLERS:  # a module without handler that shares the configuration of one with
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: expected attention without position bias; got position_bias, which a packed "
            "cache does not add to its scores. Use the protocol 'full'."
        )
    if options.get("dropout"):
        raise UnsupportedModelError(
            f"{type(module).__name__}: expected attention without dropout; got dropout={options['dropout']}. Call "
            "model.eval() first."
        )
    scoring = Scoring(
        scaling=options.get("scaling") or query.shape[-1] ** -0.5,
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
    )
    visible = _unmasked(module, query, options) if attention_mask is None else _visible(attention_mask, module)
    return _HANDLERS[module](query, key, value, visible, scoring), None


def _unmasked(module: nn.Module, query: Tensor, options: Mapping[str, Any]) -> Bool[Tensor, "1 queries tokens"]:
    """Mask of a first step of several queries, for a model whose own attention takes none there."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    every = torch.ones(1, query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
    if query.shape[2] < 2:
        raise UnsupportedModelError(
            f"{_who(module)}: expected an attention mask for its single query; got none: the model makes masks by "
            "another configuration. Use the protocol 'full'."
        )
    return every.tril() if causal else every


def _visible(mask: Tensor, module: nn.Module) -> Bool[Tensor, "batch queries tokens"]:
    """Boolean mask from a boolean or an additive one, the same for all heads."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise UnsupportedModelError(
            f"{_who(module)}: expected an attention mask of shape (batch, 1, queries, tokens); got "
            f"{tuple(mask.shape)}. Use the protocol 'full'."
        )
    if mask.dtype == torch.bool:
        return mask[:, 0]
    # Additive masks hide with the lowest number of their dtype, or with -inf where two were added; half of that number
    # separates both from any bias.
    seen, hidden = mask[:, 0] == 0, mask[:, 0] <= torch.finfo(mask.dtype).min / 2
    if not (seen | hidden).all():
        raise UnsupportedModelError(
            f"{type(module).__name__}: expected an additive mask of zeros and the lowest number, which hides tokens; "
            "got other biases. Use the protocol 'full'."
        )
    return seen


def _mask(*, q_length: int, config: Any = None, **options: Any) -> Tensor | None:
    """Full mask; None only where the model's own implementation would also skip it, see `_unmasked`."""
    # transformers drops a plain causal mask for a prefill and lets SDPA's is_causal stand for it. The module decides
    # that flag (PaliGemma's prefix is bidirectional), so that the skip is allowed just where the model allowed it. A
    # single query always gets a mask: the columns that it sees cannot be told from the query alone.
    skips = (
        q_length > 1
        and _REPLACED.get(id(config), (None, 0))[0] != "eager"
        and options.get("allow_is_causal_skip", True)
    )
    options |= {"allow_is_causal_skip": skips, "allow_is_bidirectional_skip": False}
    return sdpa_mask(q_length=q_length, config=config, **options)
