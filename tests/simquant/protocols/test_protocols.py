"""The protocols: one decode-exact pass, and the packed cache step by step, say the same."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from helpers.models import both_stages, build, every_architecture, left_padded, logits, n_hooks
from helpers.protocols import IDS, STEPS, both_ways, through_the_cache
from helpers.quantizers import all_codes
from helpers.sites import everywhere, identity, per_group, per_token
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from artifacts.codes import Codes
from artifacts.errors import MismatchError
from artifacts.model.attention import attention_layers, hooked
from artifacts.model.layout import to_rows
from artifacts.model.transformers_release import cache_argument, returned_cache
from artifacts.quantizer import Quantizer
from artifacts.quantizers.sparse import PercentileSparse
from artifacts.sites import Site, Stage
from simquant import (
    CachePolicy,
    Chunking,
    NothingQuantizedError,
    ResidualWindow,
    decode_exact,
    evaluate,
    simulate,
)
from simquant.cache.attention.block_attention import Scoring
from simquant.policy.eviction import Eviction
from simquant.policy.policy import TENSORS
from simquant.protocols.protocol import Protocol
from simquant.protocols.two_sided_attention import encoded_tokens, two_sided_attention

POLICIES = {
    "all": CachePolicy(),
    "window": CachePolicy(sink_tokens=1, residual_tokens=5),
    "blocks": CachePolicy(sink_tokens=2, residual_tokens=3, block_tokens=8),
    "kivi": CachePolicy(
        residual_tokens=1, block_tokens=8, values=ResidualWindow(residual_tokens=9), exact_prefill=True
    ),
}

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_chunking = pytest.mark.parametrize("chunking", STEPS.values(), ids=STEPS)


def sparse_per_token(bits: int = 3) -> Quantizer:
    return PercentileSparse(channels=16, inner=per_token(bits), outlier_fraction=0.1)


def equal_fraction(one: Codes | None, other: Codes | None) -> tuple[int, int]:
    """Packed bytes that agree, and all of them."""
    if one is None or other is None:
        assert one is other is None
        return 0, 0
    first, second = all_codes(one)["inner.codes" if one.inner else "codes"], all_codes(other)
    same = first == second["inner.codes" if other.inner else "codes"]
    return int(same.sum()), same.numel()


# --- decode-exact against the cache


@pytest.mark.parametrize("make", [sparse_per_token, per_group])
@both_stages
@pytest.mark.parametrize(
    ("kept", "pieces"),
    [
        ("all", "decoding"),
        ("window", "chunks"),
        ("blocks", "decoding"),
        ("blocks", "prefill"),
        ("kivi", "prefill"),
        ("window", "whole"),
    ],
)
def test_one_pass_gives_what_decoding_step_by_step_gives(
    kept: str, pieces: str, stage: Stage, make: Callable[[], Quantizer], tiny_llama: LlamaForCausalLM
) -> None:
    policy, chunking = POLICIES[kept], STEPS[pieces]
    if make is per_group and policy.block_tokens == 1:
        policy = CachePolicy(sink_tokens=policy.sink_tokens, residual_tokens=policy.residual_tokens, block_tokens=4)
    quantizers = everywhere(make, stage)
    if make is per_group:
        quantizers |= {site: per_token() for site in quantizers if site.tensor == "value"}
    stepwise, once = both_ways(tiny_llama, quantizers, policy, chunking)
    torch.testing.assert_close(once.log_softmax(-1), stepwise.log_softmax(-1), rtol=0, atol=1e-6)


@both_stages
@every_architecture
def test_one_pass_gives_what_decoding_gives_on_other_architectures(kind: str, stage: Stage) -> None:
    stepwise, once = both_ways(build(kind), everywhere(per_token, stage), POLICIES["window"], STEPS["chunks"])
    torch.testing.assert_close(once, stepwise, rtol=1e-5, atol=1e-5)


@both_stages
def test_quantizing_everything_at_once_is_the_fully_quantized_protocol(
    stage: Stage, tiny_llama: LlamaForCausalLM
) -> None:
    quantizers, policy = everywhere(per_token, stage), CachePolicy(sink_tokens=2)
    with simulate(tiny_llama, quantizers, policy=policy) as full:
        expected = logits(tiny_llama, IDS)
    with decode_exact(tiny_llama, quantizers, policy=policy) as decode:
        torch.testing.assert_close(logits(tiny_llama, IDS), expected, rtol=1e-4, atol=1e-4)
    assert dict(full.sites) == dict(decode.sites)


@both_stages
@every_policy
def test_identities_change_nothing(policy: CachePolicy, stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    expected = logits(tiny_llama, IDS)
    with decode_exact(tiny_llama, everywhere(identity, stage), policy=policy):
        torch.testing.assert_close(logits(tiny_llama, IDS), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(tiny_llama, IDS), expected)
    assert n_hooks(tiny_llama) == 0


@both_stages
def test_the_first_layer_stores_the_codes_of_what_its_projections_return(
    stage: Stage, tiny_llama: LlamaForCausalLM
) -> None:
    """Nothing before layer 0 is quantized, so that cache and one pass are fed the very same keys and values."""
    quantizers, policy = everywhere(sparse_per_token, stage), POLICIES["window"]
    seen: dict[Site, Tensor] = {}
    sites = [site for site in quantizers if site.layer == 0]
    with hooked(attention_layers(tiny_llama), {site: lambda x, site=site: seen.update({site: x}) for site in sites}):
        logits(tiny_llama, IDS[:1])
    _, codes = through_the_cache(tiny_llama, quantizers, policy, STEPS["whole"], IDS[:1])
    for site in sites:
        x = to_rows(seen[site])
        expected, found = quantizers[site].encode(x[1:35]), codes[site, 0]
        assert found is not None
        assert all(torch.equal(all_codes(found)[name], tensor) for name, tensor in all_codes(expected).items())


@both_stages
@pytest.mark.parametrize("chunking", [STEPS["decoding"], STEPS["prefill"], Chunking(prefill_tokens=10, chunk_tokens=7)])
def test_hardly_a_code_depends_on_the_chunking(chunking: Chunking, stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    """Products of other shapes round differently, which moves a value across a boundary now and then."""
    quantizers, policy = everywhere(sparse_per_token, stage), CachePolicy(sink_tokens=1)
    found = [through_the_cache(tiny_llama, quantizers, policy, each)[1] for each in (STEPS["whole"], chunking)]
    counts = [equal_fraction(codes, found[1][place]) for place, codes in found[0].items()]
    assert sum(same for same, _ in counts) >= 0.9999 * sum(total for _, total in counts) - 1
    assert all(total for _, total in counts)


@both_stages
def test_a_trained_model_decodes_as_one_pass_says(
    stage: Stage, stories: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    tokenizer = stories[1]
    model = copy.deepcopy(stories[0]).double()  # in float32 the order of sums, by threads, moves a code now and then
    ids = torch.tensor([tokenizer("Once upon a time there was a little dog. " * 8).input_ids[:96]])
    layers = attention_layers(model)
    quantizers: dict[Site, Quantizer] = {}
    for layer in layers:
        for site in (Site(layer.layer, "key", stage), Site(layer.layer, "value")):
            quantizers[site] = type(per_token())(channels=layer.channels, bits=4)
    policy, chunking = CachePolicy(sink_tokens=1, residual_tokens=8), Chunking(prefill_tokens=32)
    stepwise, codes = through_the_cache(model, quantizers, policy, chunking, ids)
    _, other = through_the_cache(model, quantizers, policy, Chunking(prefill_tokens=96), ids)
    with decode_exact(model, quantizers, policy=policy, chunking=chunking):
        once = logits(model, ids)
    torch.testing.assert_close(once.log_softmax(-1), stepwise.log_softmax(-1), rtol=0, atol=1e-6)
    assert codes.keys() == other.keys()


# --- the band


@every_policy
@every_chunking
def test_the_band_is_what_a_cache_would_have_encoded(policy: CachePolicy, chunking: Chunking) -> None:
    for tensor in TENSORS:
        band = encoded_tokens(policy.window(tensor), policy, chunking, 40)
        for start, end in chunking.spans(40):
            stop = policy.window(tensor).encoded_end(end, policy.sink_tokens)
            expected = (torch.arange(40) >= policy.sink_tokens) & (torch.arange(40) < stop)
            if policy.exact_prefill and start == 0:
                expected[:] = False
            assert (band[start:end] == expected).all()


@pytest.mark.parametrize("sinks", [False, True])
def test_each_query_reads_its_own_mixture(sinks: bool) -> None:
    query, key, value, old_key, old_value = torch.randn(4, 6, 8), *torch.randn(4, 2, 6, 8)
    choice = torch.rand(3, 6, 6) < 0.5
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    logits_of_sinks = torch.randn(4) if sinks else None
    found = two_sided_attention(
        query,
        (key, value),
        (old_key, old_value),
        (choice[0], choice[1], visible),
        Scoring(scaling=0.5, sink_logits=logits_of_sinks),
    )
    for head in range(4):
        for t in range(6):
            keys = torch.where(choice[0, t, :, None], old_key[head // 2], key[head // 2])[: t + 1]
            values = torch.where(choice[1, t, :, None], old_value[head // 2], value[head // 2])[: t + 1]
            scores = 0.5 * keys @ query[head, t]
            weights = scores.exp() / (scores.exp().sum() + (logits_of_sinks[head].exp() if sinks else 0))
            torch.testing.assert_close(found[t, head], weights @ values, rtol=1e-4, atol=1e-5)


def test_steps_cut_a_text() -> None:
    assert Chunking().spans(3) == [(0, 1), (1, 2), (2, 3)]
    assert Chunking(prefill_tokens=9).spans(3) == [(0, 3)]
    for chunking in STEPS.values():
        spans = chunking.spans(40)
        assert [token for start, end in spans for token in range(start, end)] == list(range(40))
        assert chunking.held(40).tolist() == [end for start, end in spans for _ in range(start, end)]
    for field in ("prefill_tokens", "chunk_tokens"):
        with pytest.raises(ValueError, match=f"Chunking: {field} must be an integer from 1; got 0"):
            Chunking(**{field: 0})


# --- evaluation


@pytest.mark.parametrize("protocol", ["decode", "cache"])
def test_evaluation_agrees_and_names_its_protocol(protocol: str, tiny_llama: LlamaForCausalLM) -> None:
    quantizers, policy = everywhere(per_token), CachePolicy(sink_tokens=1, residual_tokens=4, exact_prefill=True)
    chunking = Chunking(prefill_tokens=16)
    found = evaluate(tiny_llama, IDS, quantizers, policy=policy, protocol=protocol, chunking=chunking, batch_size=2)
    with decode_exact(tiny_llama, quantizers, policy=policy, chunking=chunking):
        scores = logits(tiny_llama, IDS)[:, :-1]
    nll = nn.functional.cross_entropy(scores.transpose(1, 2), IDS[:, 1:])
    assert math.log(found.perplexity) == pytest.approx(float(nll), abs=1e-4)
    assert found.quantized_fraction == pytest.approx(35 / 40)
    assert found.bits["key"] == 4 + 32 / 16
    for phrase in ("prefill of 16 tokens, then token by token", "exact prefill attention", "last 4 tokens exact"):
        assert phrase in found.protocol
    assert ("packed cache" in found.protocol) == (protocol == "cache")
    bits = found.bits["amortised"]["2048"]["value"]
    assert bits == pytest.approx((2043 * 6 + 5 * 32) / 2048)


def test_more_exact_tokens_lose_less(tiny_llama: LlamaForCausalLM) -> None:
    windows = tiny_llama.generate(IDS[:, :2], do_sample=True, max_new_tokens=40, min_new_tokens=40, pad_token_id=0)
    quantizers = everywhere(lambda: per_token(2))
    losses = [
        evaluate(tiny_llama, windows, quantizers, policy=CachePolicy(residual_tokens=n), protocol="decode").kl_mean
        for n in (1, 8, 32)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[2]


def test_a_window_that_holds_everything_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    policy = CachePolicy(residual_tokens=40)
    with pytest.raises(NothingQuantizedError, match="last 40 tokens exact"):
        evaluate(tiny_llama, IDS, everywhere(per_token), policy=policy, protocol="decode")


@pytest.mark.parametrize("protocol", ["decode", "cache"])
def test_targets_that_an_exact_prefill_predicts_are_refused(protocol: str, tiny_llama: LlamaForCausalLM) -> None:
    """Everything is stored as codes, and nothing of it is read."""
    settings = {"policy": CachePolicy(exact_prefill=True), "protocol": protocol}
    for prefill_tokens in (39, 40):  # the last token's query predicts no target
        with pytest.raises(NothingQuantizedError, match=rf"a scored target reads .*prefill of {prefill_tokens} tokens"):
            evaluate(
                tiny_llama, IDS, everywhere(per_token), chunking=Chunking(prefill_tokens=prefill_tokens), **settings
            )
    found = evaluate(tiny_llama, IDS, everywhere(per_token), chunking=Chunking(prefill_tokens=38), **settings)
    assert found.kl_mean > 0
    sixteen = evaluate(tiny_llama, IDS, everywhere(identity), chunking=Chunking(prefill_tokens=40), **settings)
    assert sixteen.quantized_fraction == 0


SLIDING = [None, 4, 8, 40]


@pytest.mark.parametrize("protocol", ["decode", "cache"])
def test_a_layer_that_sees_exact_tokens_alone_is_refused(protocol: str) -> None:
    """A residual window as long as the sliding window: the loss was +0.000000, and nothing was said."""
    model, settings = build("gemma3_text"), {"protocol": protocol, "chunking": Chunking(chunk_tokens=8)}
    policy = CachePolicy(sink_tokens=1, residual_tokens=4)
    with pytest.raises(NothingQuantizedError, match=r"last 4 tokens exact.* layer 0 sees 4 tokens back"):
        evaluate(model, IDS, everywhere(per_token), policy=policy, protocol=protocol)
    for reads in (CachePolicy(sink_tokens=1, residual_tokens=3), CachePolicy(sink_tokens=36)):
        assert evaluate(model, IDS, everywhere(per_token), policy=reads, **settings).kl_mean > 0
    exact = {site: identity() if site.layer == 0 else per_token() for site in everywhere(per_token)}
    assert evaluate(model, IDS, exact, policy=policy, protocol=protocol).kl_mean > 0


@every_policy
@every_chunking
@pytest.mark.parametrize("window", SLIDING)
def test_codes_are_read_where_the_sliding_window_reaches(
    window: int | None, policy: CachePolicy, chunking: Chunking
) -> None:
    protocol = Protocol(name="decode", policy=policy, chunking=chunking)
    for tensor in TENSORS:
        for n_tokens, n_scored in ((9, 3), (23, 22), (40, 1)):
            band = (
                encoded_tokens(policy.window(tensor), policy, chunking, n_tokens).tril().triu(1 - (window or n_tokens))
            )
            found = protocol.reads_codes(tensor, n_tokens, n_scored=n_scored, sliding_window=window)
            assert found == bool(band[:-1][-n_scored:].any())


@every_policy
@every_chunking
def test_codes_are_read_where_the_band_says_so(policy: CachePolicy, chunking: Chunking) -> None:
    protocol = Protocol(name="decode", policy=policy, chunking=chunking)
    for tensor in TENSORS:
        for n_tokens in (2, 9, 10, 11, 22, 23, 40):
            band = encoded_tokens(policy.window(tensor), policy, chunking, n_tokens).tril()
            assert protocol.reads_codes(tensor, n_tokens) == bool(band[:-1].any())


@pytest.mark.parametrize(
    ("policy", "chunking", "causal"),
    [
        (CachePolicy(block_tokens=4), Chunking(), True),
        (CachePolicy(block_tokens=4), Chunking(prefill_tokens=16), False),
        (CachePolicy(block_tokens=4, exact_prefill=True), Chunking(prefill_tokens=16), True),
        (CachePolicy(block_tokens=4, exact_prefill=True), Chunking(prefill_tokens=16, chunk_tokens=4), False),
    ],
)
def test_what_reads_scales_of_later_tokens_is_labelled(
    policy: CachePolicy, chunking: Chunking, causal: bool, tiny_llama: LlamaForCausalLM
) -> None:
    settings = {"policy": policy, "chunking": chunking}
    line = evaluate(tiny_llama, IDS, everywhere(per_group), protocol="decode", **settings).protocol
    assert ("NOT CAUSAL" not in line) == causal
    unchanged = []
    with decode_exact(tiny_llama, everywhere(per_group), **settings):
        for n_tokens in (14, 18):  # inside the first step, and after it
            other = IDS.clone()
            other[:, n_tokens:] = 2
            before, after = (logits(tiny_llama, ids)[:, :n_tokens] for ids in (IDS, other))
            unchanged.append(torch.allclose(before, after, atol=1e-5))
    assert all(unchanged) == causal
    single = evaluate(tiny_llama, IDS, everywhere(per_token), protocol="decode", **settings)
    assert "NOT CAUSAL" not in single.protocol


def test_bits_by_context_length_say_that_eviction_is_left_out(tiny_llama: LlamaForCausalLM) -> None:
    eviction = Eviction(prefill="streaming_llm", prefill_tokens=8, prefill_recent_tokens=2)
    settings = {"protocol": "cache", "chunking": Chunking(prefill_tokens=16)}
    phrase = "bits by context length count evicted tokens, too"
    for policy in (CachePolicy(eviction=eviction), CachePolicy()):
        line = evaluate(tiny_llama, IDS, everywhere(per_token), policy=policy, **settings).protocol
        assert (phrase in line) == (policy.eviction is not None)


def test_exact_tokens_cost_what_they_take_though_no_window_holds_any(tiny_llama: LlamaForCausalLM) -> None:
    """Windows that whole blocks fill end without exact tokens; a context of another length does not."""
    policy, ids = CachePolicy(block_tokens=24), torch.cat([IDS, IDS[:, :9]], dim=1)
    found = [
        evaluate(tiny_llama, ids[:, :n], everywhere(per_token), policy=policy, protocol="decode").bits["amortised"]
        for n in (48, 49)
    ]
    assert found[0] == found[1]
    n_exact = 2048 % 24
    assert found[0]["2048"]["value"] == pytest.approx((6 * (2048 - n_exact) + 32 * n_exact) / 2048)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "full", "policy": CachePolicy(residual_tokens=1)},
            "'full' quantizes every token .* last token exact",
        ),
        ({"name": "full", "policy": CachePolicy(exact_prefill=True)}, "Use the protocol 'decode'"),
        ({"name": "full", "policy": CachePolicy(), "chunking": Chunking(prefill_tokens=3)}, "prefill of 3 tokens"),
    ],
)
def test_what_a_protocol_cannot_do_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)


def test_simulation_refuses_a_window(tiny_llama: LlamaForCausalLM) -> None:
    policy = CachePolicy(residual_tokens=3)
    with pytest.raises(ValueError, match="decode_exact"), simulate(tiny_llama, everywhere(per_token), policy=policy):
        pytest.fail("the body must not run")


def test_one_pass_refuses_padding_and_filled_caches(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = left_padded(9, 5)
    with decode_exact(tiny_llama, everywhere(per_token)):
        with pytest.raises(MismatchError, match="without padding"):
            logits(tiny_llama, ids, mask)
        cache = returned_cache(tiny_llama(IDS[:, :3], use_cache=True))
        with pytest.raises(MismatchError, match="without a filled cache"):
            tiny_llama(IDS[:, 3:], **cache_argument(tiny_llama, cache))
    assert n_hooks(tiny_llama) == 0
