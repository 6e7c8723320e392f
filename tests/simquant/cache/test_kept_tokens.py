"""Tokens that are kept exact for the small norm of their keys: which they are, how they are stored, what they cost."""

from collections.abc import Callable

import pytest
import torch
from helpers.caches import generate, step, store_of
from helpers.models import both_stages, build, left_padded, logits
from helpers.protocols import IDS, STEPS, both_ways, streams, through_the_cache
from helpers.quantizers import QUANTIZERS, all_codes, assert_same, make, tokens
from helpers.sites import everywhere, identity, per_group, per_token
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from artifacts.quantizer import Quantizer
from artifacts.sites import Stage
from simquant import CachePolicy, Eviction, PackedCache, decode_exact, evaluate, packed_cache, simulate
from simquant.cache.store.kept_exact import KeptExact
from simquant.cache.store.small_norms import SmallNorms

POLICIES = {
    "token by token": CachePolicy(sink_tokens=1, residual_tokens=5, keep_smallest_norm=2),
    "blocks": CachePolicy(sink_tokens=2, block_tokens=4, keep_smallest_norm=1),
}
CAUSAL = [name for name in QUANTIZERS if make(name).tokens_per_scale == 1]

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def chosen(keys: Tensor, n_smallest: int, sink_tokens: int) -> list[int]:
    """The rule, said again."""
    norms = keys.double().norm(dim=1)
    return [i for i in range(sink_tokens, len(keys)) if int((norms[sink_tokens:i] <= norms[i]).sum()) < n_smallest]


def small(cache: PackedCache, layer: int = 0, row: int = 0) -> list[int]:
    found = cache.layers[layer].store.sequences[row].small
    assert found is not None
    return found.numbers.tolist()


# --- which tokens


@pytest.mark.parametrize("n_smallest", [1, 3, 50])
def test_a_token_is_kept_while_few_before_it_are_smaller(n_smallest: int) -> None:
    keys = tokens(60, 16)
    keys[::7] = keys[14]  # equal ones do not push each other out
    expected = chosen(keys, n_smallest, 4)
    for sizes in ([60], [1] * 60, [7, 0, 20, 33]):
        found, flags = SmallNorms.none(n_smallest, 4, keys.device), []
        for part in keys.split(sizes):
            found, kept = found.extended(part)
            flags.append(kept)
        assert found.numbers.tolist() == torch.cat(flags).nonzero()[:, 0].tolist() == expected
        assert 0 < len(expected) < 60


@pytest.mark.parametrize("n_tokens", [0, 3, 11, 40, 60])
def test_a_cropped_text_goes_on_as_one_that_was_never_longer(n_tokens: int) -> None:
    keys = tokens(60, 16)
    whole, _ = SmallNorms.none(3, 4, keys.device).extended(keys)
    short, _ = SmallNorms.none(3, 4, keys.device).extended(keys[:n_tokens])
    again = whole.cropped(n_tokens)
    assert again.numbers.tolist() == short.numbers.tolist()
    for one, other in zip(again.extended(tokens(30, 16)), short.extended(tokens(30, 16)), strict=True):
        assert torch.equal(getattr(one, "numbers", one), getattr(other, "numbers", other))


def test_few_of_many_are_kept() -> None:
    found, _ = SmallNorms.none(3, 0, torch.device("cpu")).extended(torch.randn(5000, 16))
    assert 3 * 3 < len(found.numbers) < 3 * 3 * (1 + 8)  # about 3 (1 + ln(5000 / 3)) = 25


def test_keys_are_the_same_before_and_after_rotation(tiny_llama: LlamaForCausalLM) -> None:
    found = []
    for stage in ("pre_rope", "post_rope"):
        with packed_cache(tiny_llama, everywhere(per_token, stage), policy=POLICIES["blocks"]) as new:
            cache = new()
            step(tiny_llama, cache, IDS)
            found.append([small(cache, 0, row) for row in range(2)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


# --- one sequence


@pytest.mark.shapes
@every_policy
@pytest.mark.parametrize("make_one", [per_token, per_group, lambda: make("percentile-dynamic")])
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 1, 32]], ids=["once", "one by one", "chunks"])
def test_kept_tokens_are_read_as_they_came(
    sizes: list[int], make_one: Callable[[], Quantizer], policy: CachePolicy
) -> None:
    quantizer = make_one()
    if quantizer.tokens_per_scale == 4 and policy.block_tokens == 1:
        pytest.skip("the policy hands over no groups")
    x, kept = tokens(40, quantizer.channels), torch.rand(40) < 0.3
    store, plain = (store_of(quantizer, rules) for rules in (policy, CachePolicy(**without(policy))))
    for rows, flags in zip(x.split(sizes), kept.split(sizes), strict=True):
        store.append(rows, flags)
    end, size = store.encoded_end, quantizer.tokens_per_scale or 1
    seen = x.clone()
    for start in range(policy.sink_tokens, end, size):
        own = [i for i in range(start, start + size) if size == 1 or not kept[i]]
        for i in range(start, start + size) if own and size > 1 else []:
            seen[i] = x[own[0]] if kept[i] else x[i]
    plain.append(seen)
    expected = torch.where(kept[:, None] | (torch.arange(40) >= end)[:, None], x, plain.read(0, 40))
    assert torch.equal(store.read(0, 40), expected)
    n_small = int(kept[policy.sink_tokens : end].sum())
    assert (store.n_small, store.n_encoded + store.n_exact) == (n_small, 40)
    assert store.n_exact == plain.n_exact + n_small
    assert store.exact_bytes == store.n_exact * x[:1].nbytes
    assert store.encoded_bytes == plain.encoded_bytes + end - policy.sink_tokens  # a byte a token says which is kept
    assert sum(t.nbytes for t in store.tensors()) == store.encoded_bytes + store.exact_bytes + 40 - end
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in store.tensors())


def without(policy: CachePolicy) -> dict[str, int]:
    return {name: getattr(policy, name) for name in ("sink_tokens", "residual_tokens", "block_tokens")}


def test_a_small_key_does_not_stretch_the_scales_of_its_group() -> None:
    x = 10 + 0.1 * torch.randn(8, 16)
    x[5] = 0  # where channels stand far from zero, a small key stretches every one of them
    kept = torch.arange(8) == 5
    errors = []
    for n_smallest in (0, 1):
        store = store_of(per_group(2), CachePolicy(block_tokens=4, keep_smallest_norm=n_smallest))
        store.append(x, kept if n_smallest else None)
        errors.append((store.read(0, 8) - x)[~kept].abs().max())
    assert 2 * errors[1] < errors[0]


@pytest.mark.shapes
@pytest.mark.parametrize("name", CAUSAL)
def test_codes_with_exact_tokens_are_cut_and_chosen_by_token(name: str) -> None:
    x, kept, quantizer = tokens(24), torch.rand(24) < 0.4, KeptExact.around(make(name))
    whole = quantizer.joined(quantizer.inner.encode(x), x[kept], kept)
    picked = torch.rand(24) < 0.5
    for codes, rows in ((whole.first(11), torch.arange(24) < 11), (whole.select(picked), picked)):
        again = quantizer.joined(quantizer.inner.encode(x[rows]), x[rows & kept], kept[rows])
        assert_same(all_codes(codes), all_codes(again))
        assert torch.equal(quantizer.decode(codes), quantizer.decode(whole)[rows])


def test_a_group_that_is_kept_whole_is_read_as_it_came() -> None:
    store = store_of(per_group(2), CachePolicy(block_tokens=4, keep_smallest_norm=9))
    x = tokens(8, 16)
    store.append(x, torch.ones(8, dtype=torch.bool))
    assert torch.equal(store.read(0, 8), x)


# --- a model


@pytest.mark.parametrize("make_one", [per_token, per_group])
@pytest.mark.parametrize("steps", ["decoding", "chunks", "prefill"])
@both_stages
def test_one_pass_keeps_what_a_cache_keeps(
    stage: Stage, steps: str, make_one: Callable[[], Quantizer], tiny_llama: LlamaForCausalLM
) -> None:
    policy = CachePolicy(sink_tokens=1, residual_tokens=3, block_tokens=4, keep_smallest_norm=2)
    stepwise, once = both_ways(tiny_llama, everywhere(make_one, stage), policy, STEPS[steps])
    torch.testing.assert_close(once.log_softmax(-1), stepwise.log_softmax(-1), rtol=0, atol=1e-6)


@both_stages
def test_identities_generate_what_a_dynamic_cache_generates(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    for options in ({}, {"num_beams": 3}):
        expected = generate(tiny_llama, IDS[:, :9], DynamicCache(), **options)
        with packed_cache(tiny_llama, everywhere(identity, stage), policy=POLICIES["token by token"]) as new:
            assert torch.equal(generate(tiny_llama, IDS[:, :9], new(), **options), expected)


@both_stages
def test_a_padded_batch_keeps_what_each_sequence_keeps_alone(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, alone = left_padded(20, 13, 3)
    with packed_cache(tiny_llama, everywhere(per_token, stage), policy=POLICIES["token by token"]) as new:
        together = new()
        options = {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
        batched = step(tiny_llama, together, ids, **options)
        for row, one in enumerate(alone):
            cache = new()
            torch.testing.assert_close(batched[row][mask[row]], step(tiny_llama, cache, one)[0], rtol=1e-4, atol=1e-4)
            for layer in range(2):
                assert small(together, layer, row) == small(cache, layer)


def test_rows_are_reordered_and_steps_taken_back(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token), policy=POLICIES["token by token"]) as new:
        cache = new()
        step(tiny_llama, cache, IDS[:, :20])
        before = [small(cache, 1, row) for row in range(2)]
        first = step(tiny_llama, cache, IDS[:, 20:30])
        cache.crop(-10)
        assert [small(cache, 1, row) for row in range(2)] == before
        assert torch.equal(step(tiny_llama, cache, IDS[:, 20:30]), first)
        cache.crop(20)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert [small(cache, 1, row) for row in range(2)] == before[::-1]
        torch.testing.assert_close(step(tiny_llama, cache, IDS[[1, 0], 20:30]), first[[1, 0]])
        cache.reset()
        assert cache.nbytes == 0


def test_a_sliding_window_forgets_kept_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simquant.cache.store.layer_store.BLOCK_TOKENS", 4)
    model = build("gemma3_text")
    with packed_cache(model, everywhere(per_token), policy=CachePolicy(keep_smallest_norm=3)) as new:
        cache = new()
        for chunk in IDS.split(1, dim=1):
            assert step(model, cache, chunk).isfinite().all()
        sliding, full = (layer.store.sequences[0].key for layer in cache.layers)
        assert sliding.n_small < full.n_small == len(small(cache, 1))


@pytest.mark.parametrize("make_one", [per_token, per_group])
def test_eviction_never_drops_a_kept_token(make_one: Callable[[], Quantizer], tiny_llama: LlamaForCausalLM) -> None:
    eviction = Eviction(prefill="snapkv", prefill_tokens=8, prefill_recent_tokens=2)
    rules = CachePolicy(block_tokens=4, keep_smallest_norm=3, eviction=eviction)
    with packed_cache(tiny_llama, everywhere(make_one), policy=rules) as new:
        cache = new()
        step(tiny_llama, cache, IDS[:1])
        for later in IDS[1:, :6].split(1, dim=1):
            step(tiny_llama, cache, later)
    for layer in range(2):
        [stream] = cache.layers[layer].store.sequences
        assert stream.survivors is not None
        numbers = stream.survivors.numbers.tolist()
        assert set(small(cache, layer)) <= set(numbers)
        assert len(numbers) < 46
        assert stream.key.n_small == sum(number < stream.survivors.n_seen - 46 + 44 for number in small(cache, layer))


def test_bytes_are_those_of_codes_and_of_exact_tokens(tiny_llama: LlamaForCausalLM) -> None:
    quantizers, policy = everywhere(per_token, "post_rope"), CachePolicy(keep_smallest_norm=3)
    _, codes = through_the_cache(tiny_llama, quantizers, policy, STEPS["whole"], IDS[:1])
    n_small = sum(int(part.tensors["counts"].sum()) for part in codes.values() if part is not None)
    found = evaluate(tiny_llama, IDS[:1], quantizers, policy=policy, protocol="cache", chunking=STEPS["whole"])
    assert found.quantized_fraction == pytest.approx(1 - n_small / (4 * 40))
    a_token = 16 * 4 // 8 + 4 + 1  # codes, scale and offset, and whether it is kept
    assert found.bits["average"] == pytest.approx(8 * (4 * 40 * a_token + n_small * 16 * 4) / (4 * 40 * 16))
    amortised = [found.bits["amortised"]["2048"][tensor] for tensor in ("key", "value")]
    assert sum(amortised) / 2 == pytest.approx(found.bits["average"])
    assert "among the 3 smallest so far exact" in found.protocol
    with packed_cache(tiny_llama, quantizers, policy=policy) as new:
        cache = new()
        step(tiny_llama, cache, IDS[:1])
    notes = sum(8 * len(stream.small.numbers) for _, _, stream in streams(cache))  # numbers and norms
    assert cache.nbytes == 4 * 40 * a_token + n_small * 16 * 4 + notes


def test_a_policy_that_keeps_is_not_fully_quantized(tiny_llama: LlamaForCausalLM) -> None:
    policy = CachePolicy(keep_smallest_norm=3)
    assert policy.describe() == "tokens whose key norm is among the 3 smallest so far exact"
    with pytest.raises(ValueError, match=r"3 smallest so far exact.*decode_exact"):
        simulate(tiny_llama, everywhere(per_token), policy=policy).__enter__()
    with pytest.raises(ValueError, match="keep_smallest_norm must be an integer from 0; got -1"):
        CachePolicy(keep_smallest_norm=-1)
    with decode_exact(tiny_llama, everywhere(identity), policy=policy):
        found = logits(tiny_llama, IDS)
    torch.testing.assert_close(found, logits(tiny_llama, IDS), rtol=1e-4, atol=1e-5)
