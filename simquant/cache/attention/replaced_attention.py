"""Attention modules of a model that compute attention otherwise, by the interfaces of transformers (5.17 to 5.24).

The attention and the mask interface are registered both: with the first alone the mask is None, and attention silently
sees the future.
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
from simquant.cache.attention.block_attention import Scoring

Handler = Callable[[Tensor, Tensor, Tensor, Bool[Tensor, "batch queries tokens"], Scoring], Tensor]
"""Gets query, key and value "batch heads tokens head_dim", what is visible, and how to score."""

_NAME = "kvgauge"
_HANDLERS: dict[nn.Module, Handler] = {}
_REPLACED: dict[int, tuple[str | None, int]] = {}
"""Implementation that was chosen before, and contexts that replace it, by the id of a configuration."""


@contextmanager
def attention_replaced(model: nn.Module, handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Inside the context the attention modules of a model compute attention by their handlers.

    Attention of other modules, a vision tower's for one, is left alone. On leaving, also by an exception, the model is
    as it was.

    Raises
    ------
    MismatchError
        If the model is inside such a context already.
    UnsupportedModelError
        If an attention module does not choose its attention function by name; while the model runs, also if a module
        did not call the function, or more than once.
    """
    if not _HANDLERS.keys().isdisjoint(handlers):
        raise MismatchError(
            f"{type(model).__name__}: its attention is replaced already. Leave the outer context first: packed caches "
            "and the protocol 'decode' do not nest; several caches can come from one context."
        )
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
        for config in configs:
            _replace(config)
            stack.callback(_put_back, config)
        yield


def _replace(config: Any) -> None:
    """Models may share a configuration: the first context notes what it said, and the last puts that back."""
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
    """A handler that has to be called once whenever its module runs."""

    def __init__(self, module: nn.Module, handler: Handler) -> None:
        self._module, self._handler, self._n_calls = module, handler, 0

    def __call__(self, *args: Any) -> Tensor:
        self._n_calls += 1
        if self._n_calls > 1:
            raise self._refusal("calls its attention function more than once")
        return self._handler(*args)

    def before(self, *_: Any) -> None:
        """A hook for the module."""
        self._n_calls = 0

    def after(self, *_: Any) -> None:
        """A hook for the module."""
        if not self._n_calls:
            raise self._refusal("computed its attention itself, without the function that was chosen by name")

    def _refusal(self, fault: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{_who(self._module)} {fault}: it cannot read a packed cache. Use the protocol 'full'."
        )


def check_handed(module: nn.Module, cached: tuple[Tensor, Tensor] | None, handed: tuple[Tensor, Tensor]) -> None:
    """Attention reads the keys and values that the cache gave back, and nothing that was made of them.

    Raises
    ------
    UnsupportedModelError
        If it reads others: a packed cache cannot know what the module does to them.
    """
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
    """The configurations by which these modules choose attention, and the models around them make its masks.

    A model makes the masks of a decoder inside it by its own configuration or by the text part of that.
    """
    chosen, found = set(modules), []
    for module in chosen:
        if not hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            raise UnsupportedModelError(
                f"{type(model).__name__}: {type(module).__name__} does not choose its attention function by "
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
    if module not in _HANDLERS:  # one that shares the configuration of those that have a handler
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: attention adds a bias to its scores, which a packed cache does not; use the "
            "protocol 'full'"
        )
    if options.get("dropout"):
        raise UnsupportedModelError(
            f"{type(module).__name__}: attention over a packed cache has no dropout; use model.eval()"
        )
    scoring = Scoring(
        scaling=options.get("scaling") or query.shape[-1] ** -0.5,
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
    )
    visible = _unmasked(module, query, options) if attention_mask is None else _visible(attention_mask, module)
    return _HANDLERS[module](query, key, value, visible, scoring), None


def _unmasked(module: nn.Module, query: Tensor, options: Mapping[str, Any]) -> Bool[Tensor, "1 queries tokens"]:
    """What several queries of a first step see where the model's own attention goes without a mask."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    every = torch.ones(1, query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
    if query.shape[2] < 2:
        raise UnsupportedModelError(
            f"{_who(module)}: expected a mask for its single query; got none. Its model makes masks by a configuration "
            "of its own; use the protocol 'full'."
        )
    return every.tril() if causal else every


def _visible(mask: Tensor, module: nn.Module) -> Bool[Tensor, "batch queries tokens"]:
    """The mask as booleans, one for all heads."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise UnsupportedModelError(
            f"{_who(module)}: expected a mask of shape (batch, 1, queries, tokens); got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return mask[:, 0]
    seen, hidden = mask[:, 0] == 0, mask[:, 0] <= torch.finfo(mask.dtype).min / 2
    if not (seen | hidden).all():
        raise UnsupportedModelError(
            f"{type(module).__name__}: the mask adds to scores; only masks that hide tokens are read"
        )
    return seen


def _mask(*, q_length: int, config: Any = None, **options: Any) -> Tensor | None:
    """A whole mask, but for several queries without one in the model's own implementation: see `_unmasked`.

    What they see then is the attention module's to say: PaliGemma's see all tokens, unless they are told apart.
    """
    skips = (
        q_length > 1
        and _REPLACED.get(id(config), (None, 0))[0] != "eager"
        and options.get("allow_is_causal_skip", True)
    )
    options |= {"allow_is_causal_skip": skips, "allow_is_bidirectional_skip": False}
    return sdpa_mask(q_length=q_length, config=config, **options)
