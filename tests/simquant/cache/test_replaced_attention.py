"""Attention that cannot be replaced is refused by name: by the module that bypasses the interface, and where."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from helpers.caches import IDS, step
from helpers.models import diff_llama, logits, n_hooks
from helpers.sites import everywhere, identity
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from artifacts.errors import UnsupportedModelError
from simquant import decode_exact, packed_cache

pytestmark = pytest.mark.shapes


def run_decode(model: nn.Module) -> Tensor:
    with decode_exact(model, everywhere(identity)):
        return logits(model, IDS)


def run_cache(model: nn.Module) -> Tensor:
    with packed_cache(model, everywhere(identity)) as new_cache:
        return step(model, new_cache(), IDS)


both_ways = pytest.mark.parametrize("run", [run_decode, run_cache])


def by_itself(attention: Any, original: Any, hidden_states: Tensor, **options: Any) -> Any:
    """Chooses no function by name."""
    chosen, attention.config = attention.config, type(attention.config)(**attention.config.to_dict())
    attention.config._attn_implementation = "eager"
    try:
        return original(hidden_states, **options)
    finally:
        attention.config = chosen


def twice(attention: Any, original: Any, hidden_states: Tensor, **options: Any) -> Any:
    def again(*args: Any, **kwargs: Any) -> Any:
        interface(*args, **kwargs)
        return interface(*args, **kwargs)

    from transformers.models.llama import modeling_llama

    interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    modeling_llama.ALL_ATTENTION_FUNCTIONS["twice"] = again
    chosen, attention.config._attn_implementation_internal = attention.config._attn_implementation, "twice"
    try:
        return original(hidden_states, **options)
    finally:
        attention.config._attn_implementation_internal = chosen
        del modeling_llama.ALL_ATTENTION_FUNCTIONS["twice"]


@both_ways
def test_attention_to_other_values_than_are_cached_is_refused(run: Callable[[nn.Module], Tensor]) -> None:
    """DiffLlama's logits were wrong at 16 bits, by a KL of 1.05 and 1.89, and nothing was said."""
    model = diff_llama()
    with pytest.raises(UnsupportedModelError, match=r"layers\.0: DiffLlamaAttention attends to other values .*'full'"):
        run(model)
    assert n_hooks(model) == 0


@both_ways
@pytest.mark.parametrize(
    ("forward", "fault"), [(by_itself, "did not call its attention function"), (twice, "more than once")]
)
def test_attention_beside_the_interface_is_refused(
    forward: Callable[..., Any],
    fault: str,
    run: Callable[[nn.Module], Tensor],
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = tiny_llama.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", partial(forward, attention, attention.forward))
    with pytest.raises(UnsupportedModelError, match=rf"layers\.1: LlamaAttention .*{fault}.*'full'"):
        run(tiny_llama)
    assert n_hooks(tiny_llama) == 0


def test_models_that_share_a_configuration_may_be_replaced_side_by_side(tiny_llama: LlamaForCausalLM) -> None:
    """The context that was left last died of a KeyError, and left its name in the configuration."""
    first = copy.deepcopy(tiny_llama)
    other = LlamaForCausalLM(first.config).eval()
    before = first.config._attn_implementation
    contexts = [packed_cache(model, everywhere(identity)) for model in (first, other)]
    for context in contexts:
        context.__enter__()
    contexts[0].__exit__(None, None, None)
    assert first.config._attn_implementation != before
    contexts[1].__exit__(None, None, None)
    assert first.config._attn_implementation == before
