"""Sixteen bits lose nothing under any protocol, whatever a model's logits depend on; otherwise evaluation refuses."""

import copy
from typing import Any

import pytest
import torch
from helpers.models import build, diff_llama
from helpers.sites import everywhere, identity, per_token
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from artifacts.errors import MismatchError, UnsupportedModelError
from artifacts.model.transformers_release import cache_argument
from artifacts.sites import Site
from simquant import Chunking, evaluate, packed_cache
from simquant.cache.attention import replaced_attention
from simquant.protocols.protocol import ProtocolName

pytestmark = pytest.mark.shapes

WINDOWS = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(5))

every_protocol = pytest.mark.parametrize("protocol", ["full", "decode", "cache"])


def longrope() -> PreTrainedModel:
    """Phi-3 beyond 16 tokens rotates by other factors, so that logits depend on how a text is cut."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    lengths = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    return build("phi3", rope_parameters=rope | {"original_max_position_embeddings": 16}, **lengths)


def dynamic() -> PreTrainedModel:
    return build(
        "llama",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        max_position_embeddings=16,
    )


@every_protocol
@pytest.mark.parametrize("make", [longrope, dynamic])
def test_sixteen_bits_lose_nothing_where_logits_depend_on_the_cut(make: Any, protocol: ProtocolName) -> None:
    """Logits of steps were compared with those of one pass: KL 1.40."""
    found = evaluate(make(), WINDOWS, everywhere(identity), protocol=protocol)
    assert found.kl_mean < 1e-6
    assert abs(found.loss_nats) < 1e-4


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_their_logits_do_depend_on_the_cut(make: Any) -> None:
    once, stepwise = (
        evaluate(make(), WINDOWS, everywhere(identity), protocol=protocol).fp_perplexity
        for protocol in ("decode", "cache")
    )
    assert abs(once / stepwise - 1) > 0.01


def test_the_exact_model_reads_each_window_once_for_all_candidates(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simquant.evaluate import evaluate_each

    n_calls = []
    forward = tiny_llama.forward
    monkeypatch.setattr(tiny_llama, "forward", lambda *args, **kwargs: n_calls.append(1) or forward(*args, **kwargs))
    counts = []
    for n_candidates in (1, 3):
        n_calls.clear()
        candidates = [everywhere(per_token) for _ in range(n_candidates)]
        evaluate_each(tiny_llama, WINDOWS, candidates, protocol="cache", chunking=Chunking(chunk_tokens=8))
        counts.append(len(n_calls))
    n_windows, n_steps, n_more = 2, 6, 2
    assert counts[1] - counts[0] == n_windows * n_steps * n_more


@pytest.mark.parametrize("protocol", ["decode", "cache"])
def test_a_model_that_a_protocol_changes_is_refused(
    protocol: ProtocolName, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = replaced_attention.Scoring
    monkeypatch.setattr(
        replaced_attention, "Scoring", lambda scaling, **options: original(scaling=3 * scaling, **options)
    )
    with pytest.raises(UnsupportedModelError, match=rf"'{protocol}' changes its logits though nothing .*KL .*'full'"):
        evaluate(tiny_llama, WINDOWS, everywhere(per_token), protocol=protocol)
    assert evaluate(tiny_llama, WINDOWS, everywhere(per_token), protocol="full").kl_mean > 0


def test_diff_llama_is_evaluated_fully_quantized_alone() -> None:
    model = diff_llama()
    assert evaluate(model, WINDOWS, everywhere(identity)).kl_mean == 0
    for protocol in ("decode", "cache"):
        with pytest.raises(UnsupportedModelError, match="DiffLlamaAttention"):
            evaluate(model, WINDOWS, everywhere(identity), protocol=protocol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_refuse(dtype: torch.dtype, tiny_llama: LlamaForCausalLM) -> None:
    for protocol in ("decode", "cache"):
        evaluate(tiny_llama.to(dtype), WINDOWS, everywhere(identity), protocol=protocol)


def test_a_cache_that_the_model_drops_is_told_as_that() -> None:
    """It was said that no packed cache had been passed."""
    model = longrope()
    ids: Tensor = WINDOWS[:1, :14]
    message = r"dropped the packed cache: beyond 16 tokens .*a text of 17 tokens"
    with packed_cache(model, everywhere(identity)) as new_cache, pytest.raises(MismatchError, match=message):
        model.generate(ids, **cache_argument(model, new_cache()), max_new_tokens=8, min_new_tokens=8, do_sample=False)


def test_a_fault_of_later_steps_alone_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    """Half of the tokens that are tried fill the cache: the median over all of them passed over the others."""

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        packed = any(type(value).__name__ == "PackedCache" for value in kwargs.values())
        return (output[0] + output[0].flip(-1), *output[1:]) if packed and output[0].shape[1] == 1 else output

    handle = tiny_llama.model.layers[0].self_attn.register_forward_hook(spoil, with_kwargs=True)
    try:
        with pytest.raises(UnsupportedModelError, match="changes its logits though nothing is quantized"):
            evaluate(tiny_llama, WINDOWS, everywhere(per_token), protocol="cache")
    finally:
        handle.remove()


def test_logits_that_a_coarse_model_widens_are_held_to_its_own_rounding(tiny_llama: LlamaForCausalLM) -> None:
    """A model in bfloat16 whose head ends in float32 was refused."""
    model = copy.deepcopy(tiny_llama).bfloat16()
    model.lm_head.register_forward_hook(lambda module, args, output: output.float())
    evaluate(model, WINDOWS, everywhere(per_token), protocol="cache")


def test_quantizers_for_a_layer_too_many_are_named(tiny_llama: LlamaForCausalLM) -> None:
    """It was a bare KeyError."""
    more = everywhere(per_token) | {Site(2, "value"): per_token()}
    with pytest.raises(MismatchError, match=r"got others, for layers\.2\.value"):
        evaluate(tiny_llama, WINDOWS, more)
