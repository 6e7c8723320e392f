"""Probe: one small forward pass with noise in place of keys, values and queries, observed at each attention module.

Noise makes the result independent of the weights: with constant keys, a dominant bias or two equal projections a wrong
reading of a module could pass for right.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from artifacts.model.evidence import ROLES, Evidence, norm, projection, text_config
from artifacts.model.hooks import evaluating, intercept_cache, uncompiled
from artifacts.model.rope import position_tables
from artifacts.model.transformers_release import exchange_cache, named_arguments, returned_cache

_MIN_TOKENS = 11
# OLMo and DBRX clip their projections to about +-8. A standard deviation of 16 puts most values beyond that, so that a
# tensor clipped after the projection differs from what the projection returned.
_NOISE_SCALE = 16.0


@dataclass(frozen=True)
class Probed:
    """Observations of one forward pass.

    Parameters
    ----------
    of : dict from nn.Module to Evidence
        What each attention module did.
    filled : set of int
        Indices of the cache's layers that hold keys afterwards.
    """

    of: dict[nn.Module, Evidence]
    filled: set[int]


def probe(model: nn.Module, modules: Sequence[nn.Module]) -> Probed:
    """Runs the model once on a few tokens and records what these modules do; the model is left unchanged."""
    evidence = {module: Evidence(module) for module in modules}
    filled = set[int]()
    noise = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled())
        stack.enter_context(torch.no_grad())
        for seen in evidence.values():
            for handle in _watch(seen, noise):
                stack.callback(handle.remove)
        try:
            filled |= _filled(model(input_ids=_token_ids(model), use_cache=True))
        except Exception as error:  # a model's own code may raise anything; what was seen until then still counts
            for seen in evidence.values():
                seen.failure = f"the model's forward pass on a few tokens stopped with {error!r}"
    return Probed(evidence, filled)


def _filled(output: Any) -> set[int]:
    layers = getattr(returned_cache(output), "layers", ())
    return {index for index, layer in enumerate(layers) if getattr(layer, "keys", None) is not None}


def _token_ids(model: nn.Module) -> Tensor:
    """Token ids for the probe."""
    # A number of tokens that equals no number of heads identifies the token axis of a four-dimensional output.
    head_counts = [value for name, value in vars(text_config(model)).items() if "head" in name]
    n_tokens = next(n for n in range(_MIN_TOKENS, 10**6) if n not in head_counts)
    of_transformers: Any = next(module for module in model.modules() if hasattr(module, "get_input_embeddings"))
    weight: Tensor = of_transformers.get_input_embeddings().weight
    ids = torch.arange(n_tokens, device="cpu" if weight.is_meta else weight.device)
    return (ids % weight.shape[0]).unsqueeze(0)


def _watch(seen: Evidence, noise: torch.Generator) -> Iterator[RemovableHandle]:
    children = {find(seen.module, role) for role in ROLES for find in (projection, norm)} - {None}

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        passed = named_arguments(module, args, kwargs)
        seen.called, seen.position_embeddings = True, position_tables(module, passed)
        seen.mask = passed.get("attention_mask")
        return exchange_cache(module, (args, kwargs), listened)

    def listened(cache: Any) -> Any:
        seen.handed = cache is not None
        return _Listened(cache, seen.calls) if seen.handed else None

    def record(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        seen.cached.append((key.clone(), value.clone()))
        return key, value

    for child in sorted(child for child in children if child):
        yield seen.module.get_submodule(child).register_forward_hook(_stand_in(seen, child, noise))
    yield intercept_cache(seen.module, record)
    # Prepended last, so it runs before the interceptor, which puts a cache in place of none.
    yield seen.module.register_forward_pre_hook(note, prepend=True, with_kwargs=True)


def _stand_in(seen: Evidence, child: str, noise: torch.Generator) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        # Copies: a module may change its input or output in place afterwards, as fused kernels and clipping do.
        seen.received[child] = args[0].clone()
        seen.sent[child] = (_NOISE_SCALE * torch.randn(output.shape, generator=noise)).to(output)
        return seen.sent[child].clone()

    return hook


class _Listened:
    """Cache proxy that records which attributes are used."""

    def __init__(self, cache: Any, calls: set[str]) -> None:
        self._cache, self._calls = cache, calls

    def __getattr__(self, name: str) -> Any:
        self._calls.add(name)
        return getattr(self._cache, name)
