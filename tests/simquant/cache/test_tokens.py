"""Positions and padding are what attention sees: whoever calls the model, and whatever form the mask has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.models import random_llama
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

from artifacts.errors import MismatchError, UnsupportedModelError
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.sites import Site
from simquant import CachePolicy, Usage, decode_exact, packed_cache, simulate

pytestmark = pytest.mark.shapes

IDS = torch.arange(3, 19).view(1, 16)
SINKS = CachePolicy(sink_tokens=2)
QUANTIZERS: dict[Site, Quantizer] = {
    site: DynamicAffine(channels=16, bits=3)
    for layer in range(2)
    for site in (Site(layer, "key", "pre_rope"), Site(layer, "value"))
}
PADDED = torch.cat([torch.zeros(1, 4, dtype=torch.int64), IDS], dim=1)
MASK = PADDED > 0


class Wrapper(nn.Module):
    """As PEFT wraps a model: everything is handed on, and `generate` calls the inner model by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.generate(*args, **kwargs)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


both_wrappers = pytest.mark.parametrize("wrap", [Wrapper, compiled])


@contextmanager
def simulated(model: nn.Module) -> Iterator[tuple[Callable[[], dict[str, Any]], Usage]]:
    with simulate(model, QUANTIZERS, policy=SINKS) as usage:
        yield dict, usage


@contextmanager
def packed(model: nn.Module) -> Iterator[tuple[Callable[[], dict[str, Any]], Usage]]:
    usage = Usage(QUANTIZERS)
    with packed_cache(model, QUANTIZERS, policy=SINKS) as new_cache:
        cache = new_cache()
        yield lambda: cache_argument(model, cache), usage
    for layer in cache.layers:
        for site, store in layer.store.stores():
            usage.add_store(site, store)


def generated(model: Any, context: Any) -> tuple[Tensor, tuple[float, ...]]:
    """Logits of twelve steps, share quantized, and bits."""
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with context(model) as (argument, usage):
        found = model.generate(IDS, **argument(), **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(found.logits), (usage.quantized_fraction, usage.bits("key"), usage.bits("value"))


@both_wrappers
@pytest.mark.parametrize("context", [simulated, packed])
def test_a_wrapped_model_generates_as_the_bare_one(context: Any, wrap: Any, tiny_llama: LlamaForCausalLM) -> None:
    """A PEFT model's `generate` never shows its steps to the wrapper: each was taken for the start of a text."""
    expected, counted = generated(tiny_llama, context)
    logits, of_wrapped = generated(wrap(tiny_llama), context)
    assert torch.equal(logits, expected)
    assert of_wrapped == counted
    assert counted[0] == (16 + 11 - 2) / (16 + 11)


def steps(model: nn.Module, ids: Tensor, mask: Tensor | None, cache: Any, sizes: tuple[int, ...]) -> Tensor:
    """Logits of a text that is read in steps, with positions that count what is no padding."""
    found, end = [], 0
    for size in sizes:
        start, end = end, end + size
        options: dict[str, Tensor] = {}
        if mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
            options = {"attention_mask": mask[:, :end].long(), "position_ids": positions[:, start:end]}
        with torch.no_grad():
            found.append(model(ids[:, start:end], use_cache=True, **options, **cache_argument(model, cache)).logits)
    return torch.cat(found, dim=1)


def caches(model: Any) -> dict[str, Any]:
    return {"dynamic": DynamicCache(config=model.config), "static": StaticCache(config=model.config, max_cache_len=32)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", [(20,), (3, 3, 10, 1, 3), (19, 1)])
def test_left_padding_keeps_the_same_sinks(implementation: str, kind: str, sizes: tuple[int, ...]) -> None:
    """A static cache is handed a mask of four axes, which was ignored: padding was quantized, and kept as sinks."""
    model = random_llama(attn_implementation=implementation)
    with simulate(model, QUANTIZERS, policy=SINKS) as usage:
        expected = steps(model, IDS, None, caches(model)[kind], (16,))
    with simulate(model, QUANTIZERS, policy=SINKS) as of_padded:
        logits = steps(model, PADDED, MASK, caches(model)[kind], sizes)
    assert torch.allclose(logits[:, 4:], expected, atol=2e-5)
    assert of_padded.quantized_fraction == usage.quantized_fraction == 14 / 16
    assert of_padded.bits("key") == usage.bits("key")


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_padded_generation_keeps_the_same_sinks(cache_implementation: str, tiny_llama: LlamaForCausalLM) -> None:
    """As transformers itself builds the masks of a static cache, in `generate`."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    with simulate(tiny_llama, QUANTIZERS, policy=SINKS) as usage:
        expected = torch.stack(tiny_llama.generate(IDS, **options).logits)
    options |= {"cache_implementation": cache_implementation, "attention_mask": MASK.long()}
    with simulate(tiny_llama, QUANTIZERS, policy=SINKS) as of_padded:
        logits = torch.stack(tiny_llama.generate(PADDED, **options).logits)
    assert torch.allclose(logits, expected, atol=2e-5)
    assert of_padded.quantized_fraction == usage.quantized_fraction


def four_axes(form: str) -> Tensor:
    visible = torch.ones(20, 20, dtype=torch.bool).tril() & MASK
    if form == "boolean":
        return visible[None, None]
    lowest = -1e9 if form == "of a billion" else torch.finfo(torch.float32).min
    mask = torch.zeros(1, 1, 20, 20).masked_fill(~visible, lowest)
    return mask.expand(1, 4, 20, 20) if form == "for each head" else mask


@pytest.mark.parametrize("form", ["boolean", "additive", "of a billion", "for each head"])
def test_masks_of_four_axes_tell_padding(form: str, tiny_llama: LlamaForCausalLM) -> None:
    positions = {"position_ids": (MASK.long().cumsum(1) - 1).clamp_min(0)}
    found = []
    for mask in (MASK.long(), four_axes(form)):
        with simulate(tiny_llama, QUANTIZERS, policy=SINKS) as usage, torch.inference_mode():
            logits = tiny_llama(PADDED, attention_mask=mask, use_cache=False, **positions).logits
        found.append((logits[:, 4:], usage.quantized_fraction))
    assert torch.allclose(found[0][0], found[1][0], atol=2e-5)
    assert found[0][1] == found[1][1] == 14 / 16


@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_a_packed_cache_reads_masks_of_four_axes(form: str, tiny_llama: LlamaForCausalLM) -> None:
    """Padding was stored as text, and its first tokens as sinks."""
    positions = {"position_ids": (MASK.long().cumsum(1) - 1).clamp_min(0)}
    found = []
    for mask in (MASK.long(), four_axes(form)):
        with packed(tiny_llama) as (argument, usage), torch.no_grad():
            logits = tiny_llama(PADDED, attention_mask=mask, **argument(), **positions).logits
        found.append((logits[:, 4:], usage.quantized_fraction))
    assert torch.allclose(found[0][0], found[1][0], atol=2e-5)
    assert found[0][1] == found[1][1] == 14 / 16


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["bare", "wrapped"])
@pytest.mark.parametrize("mask", [MASK.long(), four_axes("boolean")])
def test_decode_exact_refuses_padding_in_every_form(mask: Tensor, wrap: Any, tiny_llama: LlamaForCausalLM) -> None:
    """Through a wrapper's `generate`, or in a mask of four axes, padding passed for text."""
    with decode_exact(wrap(tiny_llama), QUANTIZERS), pytest.raises(MismatchError, match="without padding"):
        tiny_llama(PADDED, attention_mask=mask, use_cache=False)


def sliding(window: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING["mistral"](
        vocab_size=64, num_hidden_layers=2, head_dim=8, sliding_window=window, initializer_range=0.2, **sizes
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", [(20,), (6, 8, 1, 1, 4)])
def test_sinks_leave_a_sliding_window_as_text(kind: str, sizes: tuple[int, ...]) -> None:
    """What a window has dropped is no padding: later tokens stay encoded."""
    model = sliding(window=5)
    with simulate(model, QUANTIZERS, policy=SINKS) as usage:
        expected = steps(model, IDS, None, caches(model)[kind], (16,))
    with simulate(model, QUANTIZERS, policy=SINKS) as of_padded:
        logits = steps(model, PADDED, MASK, caches(model)[kind], sizes)
    assert torch.allclose(logits[:, 4:], expected, atol=2e-5)
    assert of_padded.quantized_fraction == usage.quantized_fraction == 14 / 16


def test_sinks_that_a_sliding_window_cannot_tell_are_refused() -> None:
    model, policy = sliding(window=5), CachePolicy(sink_tokens=5)
    with (
        simulate(model, QUANTIZERS, policy=policy),
        pytest.raises(MismatchError, match=r"layers\.0: .* the sliding window of 5, .* got 5 sink_tokens"),
    ):
        steps(model, PADDED, MASK, DynamicCache(config=model.config), (10, 10))


@pytest.mark.parametrize("mask", [torch.ones(1, 12, 16), torch.ones(1, 1, 16, 12), torch.ones(3, 1, 16, 16), object()])
def test_masks_that_do_not_tell_padding_are_refused(mask: Any, tiny_llama: LlamaForCausalLM) -> None:
    """A mask of flex attention, say: what it hides cannot be read off, and nothing may be guessed."""
    attention = tiny_llama.model.layers[0].self_attn
    tables = tiny_llama.model.rotary_emb(torch.zeros(1, 16, 32), torch.arange(16)[None])
    with (
        simulate(tiny_llama, QUANTIZERS, policy=SINKS),
        pytest.raises(UnsupportedModelError, match=r"layers\.0: expected an attention mask of 1 sequences and 16"),
    ):
        attention(hidden_states=torch.zeros(1, 16, 32), position_embeddings=tables, attention_mask=mask)
