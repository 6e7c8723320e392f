"""Eviction: budgets are kept, keys and values go together, and what is gone is never read again."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.caches import generate, step
from helpers.models import both_stages, build, left_padded
from helpers.quantizers import QUANTIZERS, all_codes, assert_same, make, tokens
from helpers.sites import everywhere, identity, per_token
from torch import Tensor
from transformers import LlamaForCausalLM

from artifacts.errors import MismatchError
from artifacts.model.attention import attention_layers
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.sparse import RankSparse
from artifacts.quantizers.streaming import Streaming
from simquant import (
    CachePolicy,
    CacheStateError,
    Eviction,
    PackedCache,
    ResidualWindow,
    decode_exact,
    from_scope_options,
    packed_cache,
    simulate,
)
from simquant.cache.attention.block_attention import Scoring
from simquant.cache.evictor import attention_received, pooled
from simquant.cache.store.cached_sequence import Survivors
from simquant.cache.store.token_store import TokenStore
from simquant.evaluation.attention_inputs import attention_inputs

CHANNELS = 16
PROMPT = (torch.arange(40) * 7 % 61 + 2)[None]
LATER = (torch.arange(14) * 5 % 59 + 3)[None]
SMALL = {"prefill_tokens": 16, "prefill_recent_tokens": 4, "decoding_tokens": 8, "decoding_recent_tokens": 3}
PREFILL = ("all", "snapkv", "pyramidkv", "h2o", "streaming_llm")
PAIRS = [(method, "slide") for method in PREFILL] + [
    ("all", "h2o"),
    ("snapkv", None),
    ("pyramidkv", "adaptive"),
    ("h2o", "discontinuous"),
]


def eviction(**options: Any) -> Eviction:
    return Eviction(**{**SMALL, "growth_steps": 2, **options})


def policy(**options: Any) -> CachePolicy:
    return CachePolicy(eviction=eviction(**options))


def survivors(cache: PackedCache, layer: int = 0, row: int = 0) -> Survivors:
    found = cache.layers[layer].store.sequences[row].survivors
    assert found is not None
    return found


def held(cache: PackedCache, layer: int = 0, row: int = 0) -> list[int]:
    return survivors(cache, layer, row).numbers.tolist()


def decoding(model: LlamaForCausalLM, cache: PackedCache, prompt: Tensor = PROMPT) -> Iterator[Tensor]:
    """The logits of the prompt and of each later token."""
    for ids in (prompt, *LATER.split(1, dim=1)):
        yield step(model, cache, ids)


def per_group() -> Quantizer:
    return DynamicAffine(channels=CHANNELS, bits=4, per="channel", group_size=4)


# --- codes and stores


@pytest.mark.shapes
@pytest.mark.parametrize("name", QUANTIZERS)
def test_selected_codes_are_those_of_the_selected_tokens(name: str) -> None:
    quantizer, x = make(name), tokens(24)
    codes, group = quantizer.encode(x), quantizer.tokens_per_scale or 24
    groups = torch.rand(24 // group) < 0.5
    groups[0] = True
    kept = groups.repeat_interleave(group)
    if isinstance(quantizer, Streaming):
        kept[:] = True
    found = codes.select(kept)
    assert torch.equal(quantizer.decode(found), quantizer.decode(codes)[kept])
    assert found.nbytes < codes.nbytes or kept.all()
    if group == 1:
        assert_same(all_codes(found), all_codes(quantizer.encode(x[kept])))
        assert codes.select(torch.zeros(24, dtype=torch.bool)).nbytes == 0
    else:
        kept[group - 1] = False
        with pytest.raises(ValueError, match="cannot drop"):
            codes.select(kept)


@pytest.mark.shapes
@pytest.mark.parametrize("name", ["identity", "percentile-dynamic", "rank-affine"])
def test_a_store_goes_on_with_what_it_kept(name: str) -> None:
    x, quantizer = tokens(60), make(name)
    rules = CachePolicy(sink_tokens=2, residual_tokens=5, block_tokens=4)
    store = TokenStore(quantizer, rules, rules.window("key"), 8)
    store.append(x[:40])
    before, kept = store.read(0, 40), torch.ones(40, dtype=torch.bool)
    kept[[2, 9, 10, 11, 30, 33]] = False
    unchanged = store.copy()
    store.keep(kept)
    assert torch.equal(store.read(0, store.n_tokens), before[kept])
    assert torch.equal(unchanged.read(0, 40), before)
    for part in x[40:].split([1, 12, 7]):
        store.append(part)
        unchanged.append(part)
    expected = unchanged.read(0, 60)[torch.cat([kept, torch.ones(20, dtype=torch.bool)])]
    assert torch.equal(torch.cat([store.read(*span) for span in store.spans()]), expected)
    assert store.n_exact == unchanged.n_exact
    assert [codes.shape[0] for codes in store.blocks] == [8] * (len(store.blocks) - 1) + [store.n_encoded % 8 or 8]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in store.tensors())


# --- scores


@pytest.mark.shapes
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_scores_are_the_summed_attention_weights(
    sinks: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simquant.cache.evictor._SCORES", 150)  # so that queries come in parts
    query, key, visible = torch.randn(6, 5, 8), torch.randn(2, 37, 8), torch.rand(5, 37) < 0.5
    visible[3] = False  # sees nothing
    logits = torch.randn(6) if sinks else None
    scores = 0.3 * query @ key.repeat_interleave(3, 0).transpose(1, 2)
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).masked_fill(~visible, -torch.inf)
    extra = torch.full((6, 5, 1), -torch.inf) if logits is None else logits[:, None, None].expand(-1, 5, 1)
    expected = torch.cat([scores, extra], 2).softmax(2)[..., :-1].nan_to_num().sum(1).view(2, 3, 37).mean(1)

    found = attention_received(
        query,
        2,
        lambda: zip(key.split(8, dim=1), visible.split(8, dim=1), strict=True),
        Scoring(scaling=0.3, softcap=softcap, sink_logits=logits),
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.shapes
@pytest.mark.parametrize("kernel_tokens", [1, 3, 5])
def test_pooling_looks_at_neighbours(kernel_tokens: int) -> None:
    x, half = torch.rand(2, 11), kernel_tokens // 2
    around = [x[:, max(0, i - half) : i + half + 1] for i in range(11)]
    mean = torch.stack([part.sum(1) / kernel_tokens for part in around], 1)
    torch.testing.assert_close(pooled(x, "avg", kernel_tokens), mean)
    assert torch.equal(pooled(x, "max", kernel_tokens), torch.stack([part.amax(1) for part in around], 1))


@both_stages
@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_what_stays_of_a_prompt_is_what_a_naive_reference_chooses(
    method: Any, stage: Any, tiny_llama: LlamaForCausalLM
) -> None:
    inputs = attention_inputs(tiny_llama, attention_layers(tiny_llama), PROMPT[0])
    with packed_cache(tiny_llama, everywhere(identity, stage), policy=policy(prefill=method)) as new:
        cache = new()
        step(tiny_llama, cache, PROMPT)
    for own in inputs:
        query, key = own.rotated(own.query)[0], own.rotated(own.key)[0].repeat_interleave(2, 0)
        causal = torch.ones(40, 40, dtype=torch.bool).tril()
        weights = (query @ key.mT / 8**0.5).masked_fill(~causal, -torch.inf).softmax(2)
        scores = weights[:, -4:].sum(1) if method == "snapkv" else weights.sum(1)
        scores = scores[:, :36]
        if method == "snapkv":
            scores = torch.nn.functional.pad(scores, (2, 2)).unfold(1, 5, 1).mean(2)
        best = scores.mean(0).topk(12).indices.sort().values.tolist()
        assert held(cache, own.layer.layer) == [*best, 36, 37, 38, 39]


def test_what_stays_of_later_tokens_is_what_the_last_query_reads_most(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(identity), policy=policy(decoding="slide")) as new:
        cache = new()
        for index, _ in enumerate(decoding(tiny_llama, cache)):
            if index == 9:
                break
    inputs = attention_inputs(tiny_llama, attention_layers(tiny_llama), torch.cat([PROMPT, LATER[:, :9]], 1)[0])
    for own in inputs:  # nothing was dropped before this step, so that the exact model reads the same
        query, key = own.rotated(own.query)[0, :, -1:], own.rotated(own.key)[0].repeat_interleave(2, 0)
        scores = (query @ key.mT / 8**0.5).softmax(2).mean(0)[0]
        best = 40 + scores[40:46].topk(5).indices.sort().values
        assert held(cache, own.layer.layer) == [*range(40), *best.tolist(), 46, 47, 48]


# --- budgets


@pytest.mark.shapes
@pytest.mark.parametrize(("method", "later"), PAIRS)
def test_budgets_are_kept_at_every_step(method: Any, later: Any, tiny_llama: LlamaForCausalLM) -> None:
    of_prompt = {"all": [40, 40], "pyramidkv": [4 + 24, 4 + 12]}.get(method, [16, 16])
    expected = list(of_prompt)
    with packed_cache(tiny_llama, everywhere(per_token), policy=policy(prefill=method, decoding=later)) as new:
        cache = new()
        for n_decoded, logits in enumerate(decoding(tiny_llama, cache)):
            assert logits.isfinite().all()
            assert cache.get_seq_length() == 40 + n_decoded
            width = 8 if later in ("slide", "h2o") else min(8, 3 + n_decoded // 2)
            evicts = n_decoded > 0 and later is not None and (later != "discontinuous" or n_decoded % 2 == 0)
            for layer, cap in enumerate(of_prompt):
                expected[layer] += n_decoded > 0
                if evicts:
                    expected[layer] = min(expected[layer], cap + width)
                numbers = held(cache, layer)
                assert len(numbers) == expected[layer]
                assert numbers[-3:] == [37 + n_decoded, 38 + n_decoded, 39 + n_decoded]
                assert later == "h2o" or sum(number < 40 for number in numbers) == cap
                [stream] = cache.layers[layer].store.sequences
                assert {store.n_tokens for store in stream.stores()} == {len(numbers)}


def test_streaming_llm_keeps_both_ends(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token), policy=policy(prefill="streaming_llm")) as new:
        cache = new()
        step(tiny_llama, cache, PROMPT)
    assert held(cache) == held(cache, 1) == [*range(12), *range(36, 40)]


def test_a_prompt_within_its_budget_stays_whole(tiny_llama: LlamaForCausalLM) -> None:
    for method in PREFILL:
        with packed_cache(tiny_llama, everywhere(per_token), policy=policy(prefill=method, prefill_tokens=40)) as new:
            cache = new()
            step(tiny_llama, cache, PROMPT)
        assert held(cache) == list(range(40))


@pytest.mark.parametrize("n_layers", [1, 2, 32])
@pytest.mark.parametrize("n_tokens", [30, 45, 4000])
def test_a_pyramid_falls_by_equal_steps_around_the_mean(n_tokens: int, n_layers: int) -> None:
    rules = eviction(prefill="pyramidkv", prefill_tokens=29, prefill_recent_tokens=5)
    choices = [rules.of_prompt(n_tokens, layer, n_layers) for layer in range(n_layers)]
    kept = [choice.n_kept for choice in choices if choice is not None]
    fall = kept[0] - kept[1] if n_layers > 1 else 0
    assert kept == [kept[0] - layer * fall for layer in range(n_layers)]
    assert fall >= 0
    assert min(kept) > 0
    assert max(kept) == min(47, n_tokens - 5)
    assert sum(kept) >= 24 * n_layers


def test_tokens_that_the_policy_keeps_exact_are_never_dropped(tiny_llama: LlamaForCausalLM) -> None:
    rules = CachePolicy(
        sink_tokens=3, residual_tokens=10, eviction=eviction(prefill="h2o", decoding="h2o", decoding_tokens=4)
    )
    with packed_cache(tiny_llama, everywhere(per_token), policy=rules) as new:
        cache = new()
        for n_decoded, _ in enumerate(decoding(tiny_llama, cache)):
            numbers = held(cache)
            assert numbers[:3] == [0, 1, 2]
            assert numbers[-10:] == list(range(30 + n_decoded, 40 + n_decoded))
            assert len(numbers) == 16 + min(4, n_decoded)
            [stream] = cache.layers[0].store.sequences
            assert (stream.key.n_exact, stream.value.n_exact) == (13, 13)


@pytest.mark.shapes
def test_tokens_that_share_scales_go_together(tiny_llama: LlamaForCausalLM) -> None:
    quantizers = everywhere(per_token)
    quantizers = {site: per_group() if site.tensor == "key" else own for site, own in quantizers.items()}
    rules = CachePolicy(
        sink_tokens=1,
        residual_tokens=1,
        block_tokens=8,
        values=ResidualWindow(residual_tokens=9),
        eviction=eviction(prefill="snapkv", prefill_tokens=18, decoding="slide", decoding_tokens=10),
    )
    with packed_cache(tiny_llama, quantizers, policy=rules) as new:
        cache, lengths = new(), []
        for _ in decoding(tiny_llama, cache):
            [stream] = cache.layers[1].store.sequences
            numbers, end = held(cache, 1), stream.key.encoded_end
            groups = [numbers[i : i + 4] for i in range(1, end, 4)]
            assert all(group == list(range(group[0], group[0] + 4)) for group in groups)
            assert all(group[0] % 4 == 1 for group in groups)
            assert stream.key.n_tokens == stream.value.n_tokens == len(numbers)
            lengths.append(len(numbers))
    assert 18 <= lengths[0] < 18 + 4
    assert lengths[0] + 10 <= max(lengths) < lengths[0] + 10 + 2 * 8
    assert lengths[-1] < lengths[0] + 14


@pytest.mark.shapes
@both_stages
@pytest.mark.parametrize("wrapped", [False, True])
def test_running_scales_lose_whole_chunks_and_go_on(wrapped: bool, stage: Any, tiny_llama: LlamaForCausalLM) -> None:
    def running() -> Quantizer:
        inner = Streaming(channels=CHANNELS, bits=4, chunk_tokens=4, outlier_threshold_relative=1.5)
        return RankSparse(channels=CHANNELS, inner=inner, outliers_per_token=1) if wrapped else inner

    whole = CachePolicy(sink_tokens=1, block_tokens=4)
    rules = replace(whole, eviction=eviction(prefill="snapkv", decoding="slide"))
    with packed_cache(tiny_llama, everywhere(running, stage), policy=whole) as new:
        full = new()
        step(tiny_llama, full, PROMPT)
    with packed_cache(tiny_llama, everywhere(running, stage), policy=rules) as new:
        cache = new()
        step(tiny_llama, cache, PROMPT)
        numbers = held(cache)
        groups = [numbers[i : i + 4] for i in range(1, len(numbers) - 3, 4)]
        assert all(group == list(range(group[0], group[0] + 4)) and group[0] % 4 == 1 for group in groups)
        [before], [after] = full.layers[0].store.sequences, cache.layers[0].store.sequences
        assert 16 <= len(numbers) < 20
        assert torch.equal(after.value.read(0, len(numbers)), before.value.read(0, 40)[numbers])
        assert cache.nbytes < full.nbytes
        for ids in LATER.split(1, dim=1):
            assert step(tiny_llama, cache, ids).isfinite().all()
        assert len(held(cache)) < len(numbers) + 8 + 2 * 4


# --- what is kept, and what is gone


@both_stages
@pytest.mark.parametrize("method", PREFILL)
def test_kept_tokens_are_as_they_were(method: Any, stage: Any, tiny_llama: LlamaForCausalLM) -> None:
    whole = CachePolicy(residual_tokens=2)
    with packed_cache(tiny_llama, everywhere(per_token, stage), policy=whole) as new:
        full = new()
        step(tiny_llama, full, PROMPT)
    rules = replace(whole, eviction=eviction(prefill=method))
    with packed_cache(tiny_llama, everywhere(per_token, stage), policy=rules) as new:
        cache = new()
        step(tiny_llama, cache, PROMPT)
    for layer in range(2):
        [before], [after] = full.layers[layer].store.sequences, cache.layers[layer].store.sequences
        every, numbers = slice(0, 40), held(cache, layer)
        one, other = full.layers[layer].store, cache.layers[layer].store
        rest = slice(0, len(numbers))
        assert torch.equal(other.key(after, 0, rest, cache.tables), one.key(before, 0, every, full.tables)[:, numbers])
        assert torch.equal(other.value(after, rest), one.value(before, every)[:, numbers])


@both_stages
def test_without_methods_nothing_changes(stage: Any, tiny_llama: LlamaForCausalLM) -> None:
    found = []
    for rules in (CachePolicy(residual_tokens=3), replace(policy(), residual_tokens=3)):
        with packed_cache(tiny_llama, everywhere(per_token, stage), policy=rules) as new:
            found.append(torch.cat(list(decoding(tiny_llama, new())), 1))
    assert torch.equal(*found)


@pytest.mark.parametrize("later", ["slide", "h2o"])
def test_what_is_dropped_is_never_read_again(
    later: Any, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, n_dropped = TokenStore.keep, 0

    def spoilt(self: TokenStore, kept: Tensor) -> None:
        nonlocal n_dropped
        n_dropped += int((~kept).sum())
        for index, codes in enumerate(self.blocks):
            gone = ~kept[: self.encoded_end].split(self.block_tokens)[index]
            self.blocks[index] = codes.map(lambda values, gone=gone: values.masked_fill(gone[:, None], 1e30))
        keep(self, kept)

    found = []
    for store in (keep, spoilt):
        monkeypatch.setattr(TokenStore, "keep", store)
        with packed_cache(tiny_llama, everywhere(identity), policy=policy(prefill="snapkv", decoding=later)) as new:
            found.append(torch.cat(list(decoding(tiny_llama, new())), 1))
    assert torch.equal(*found)
    assert n_dropped == 4 * (24 + 6)


@both_stages
def test_later_steps_read_the_exact_cache_without_the_dropped_tokens(stage: Any, tiny_llama: LlamaForCausalLM) -> None:
    """Positions stay those of the text: an exact cache whose mask hides the dropped tokens gives the same logits."""
    with packed_cache(tiny_llama, everywhere(identity, stage), policy=policy(prefill="streaming_llm")) as new:
        cache = new()
        found = list(decoding(tiny_llama, cache))
    kept = torch.zeros(1, 54, dtype=torch.bool)
    kept[:, [*range(12), *range(36, 54)]] = True
    ids, causal = torch.cat([PROMPT, LATER], 1), torch.ones(54, 54, dtype=torch.bool).tril()
    mask = torch.where(torch.arange(54)[:, None] < 40, causal, causal & kept)[None, None]
    with torch.no_grad():
        expected = tiny_llama(ids, attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e30)).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_fewer_tokens_are_fewer_bytes(tiny_llama: LlamaForCausalLM) -> None:
    sizes = []
    for rules in (policy(), policy(decoding="slide"), policy(prefill="snapkv", decoding="slide")):
        with packed_cache(tiny_llama, everywhere(per_token, "post_rope"), policy=rules) as new:
            cache = new()
            list(decoding(tiny_llama, cache))
            sizes.append(cache.nbytes)
    a_token = 2 * 2 * (CHANNELS // 2 + 4) + 2 * 4  # keys and values of two layers, and its number in each
    assert sizes == [54 * a_token, 48 * a_token, 24 * a_token]


# --- requests


@pytest.mark.parametrize("later", ["adaptive", "discontinuous"])
def test_two_caches_do_not_influence_one_another(later: Any, tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token), policy=policy(prefill="h2o", decoding=later)) as new:
        alone = list(decoding(tiny_llama, new()))
        one, other = decoding(tiny_llama, new()), decoding(tiny_llama, new(), PROMPT.flip(1)[:, :23])
        for index, expected in enumerate(alone):
            assert torch.equal(next(one), expected)
            if index % 3 == 0:
                next(other)


@both_stages
def test_a_left_padded_batch_drops_what_each_sequence_drops_alone(stage: Any, tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, alone = left_padded(30, 24, 12)
    rules = policy(prefill="snapkv", decoding="slide", decoding_tokens=4, decoding_recent_tokens=2)
    with packed_cache(tiny_llama, everywhere(per_token, stage), policy=rules) as new:
        together, singles = new(), [new() for _ in alone]
        for later in (None, *LATER[:, :6].split(1, dim=1)):
            if later is not None:
                mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], 1)
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
            own = ids if later is None else later.expand(3, -1)
            options = {"attention_mask": mask.long(), "position_ids": positions[:, -own.shape[1] :]}
            batched = step(tiny_llama, together, own, **options)
            for row, (cache, one) in enumerate(zip(singles, alone, strict=True)):
                found = step(tiny_llama, cache, one if later is None else later)
                torch.testing.assert_close(batched[row, -1], found[0, -1], rtol=1e-4, atol=1e-4)
                for layer in range(2):
                    assert held(together, layer, row) == held(cache, layer)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_models_generate_on_a_cache_that_evicts(options: dict[str, Any], tiny_llama: LlamaForCausalLM) -> None:
    rules = policy(prefill="snapkv", decoding="discontinuous")
    with packed_cache(tiny_llama, everywhere(per_token), policy=rules) as new:
        cache = new()
        found = generate(tiny_llama, PROMPT, cache, max_new_tokens=14, min_new_tokens=14, **options)
    assert found.shape == (1, 54)
    for row in range(options.get("num_beams", 1)):
        assert 16 < len(held(cache, 1, row)) <= 16 + 8 + 3


def test_cropping_takes_back_only_what_nothing_was_dropped_for(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token), policy=policy(prefill="snapkv", decoding="slide")) as new:
        cache = new()
        step(tiny_llama, cache, PROMPT)
        first = step(tiny_llama, cache, LATER[:, :5])
        cache.crop(-5)
        assert survivors(cache).n_seen == 40
        assert torch.equal(step(tiny_llama, cache, LATER[:, :5]), first)
        before = held(cache)
        with pytest.raises(CacheStateError, match=r"layers\.0: .* crop to 39 tokens: the last eviction was at 40"):
            cache.crop(-6)
        assert held(cache) == before
        step(tiny_llama, cache, LATER[:, 5:10])
        with pytest.raises(CacheStateError, match="at 50 tokens"):
            cache.crop(-1)
        cache.reset()
        step(tiny_llama, cache, PROMPT)
        assert torch.equal(step(tiny_llama, cache, LATER[:, :5]), first)


# --- what cannot be evicted


def test_layers_with_a_sliding_window_forget_by_themselves() -> None:
    model = build("gemma3_text")
    with packed_cache(model, everywhere(per_token), policy=policy(prefill="streaming_llm")) as new:
        cache = new()
        step(model, cache, PROMPT)
        assert cache.layers[0].store.sequences[0].survivors is None
        assert cache.layers[0].store.sequences[0].key.n_tokens == 40
        assert len(held(cache, 1)) == 16
    model = build("gemma3_text", layer_types=["sliding_attention", "sliding_attention"])
    with (
        pytest.raises(MismatchError, match=r"eviction: .* got 2 layers of sliding-window"),
        packed_cache(model, everywhere(per_token), policy=policy(prefill="streaming_llm")),
    ):
        pytest.fail("the body must not run")


def test_what_cannot_evict_says_so(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(MismatchError, match=r"decode_exact: .* 8 decoded tokens kept by slide.*protocol 'cache'"):
        decode_exact(tiny_llama, everywhere(per_token), policy=policy(decoding="slide")).__enter__()
    with pytest.raises(ValueError, match="8 decoded tokens kept by slide"):
        simulate(tiny_llama, everywhere(per_token), policy=policy(decoding="slide")).__enter__()


# --- options


def test_the_names_of_scope_mean_what_they_meant() -> None:
    found = from_scope_options(
        method="PyramidKV",
        max_capacity_prompt=512,
        window_size=8,
        kernel_size=7,
        pooling="maxpool",
        decoding_metric="Adaptive",
        decoding_window_size=1024,
        decoding_recent_size=160,
        delta=30,
    )
    assert found == Eviction(
        prefill="pyramidkv",
        prefill_tokens=512,
        prefill_recent_tokens=8,
        kernel_tokens=7,
        pooling="max",
        decoding="adaptive",
        decoding_tokens=1024,
        decoding_recent_tokens=160,
        growth_steps=30,
    )
    assert from_scope_options(method="ALLKV", decoding_metric="None") == Eviction()
    assert from_scope_options(prefill_window_size=64, prefill_recent_size=8).prefill_tokens == 64


def test_unknown_and_repeated_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'prefill_windown_size'.*Nearest: prefill_window_size"):
        from_scope_options(prefill_windown_size=512)
    with pytest.raises(ValueError, match=r"one option for prefill_tokens; got prefill_window_size"):
        from_scope_options(max_capacity_prompt=64, prefill_window_size=64)
    with pytest.raises(ValueError, match=r"method: expected one of allkv, snapkv, .*; got 'pyramidinfer'"):
        from_scope_options(method="PyramidInfer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": "best"}, "prefill: expected one of"),
        ({"decoding": "all"}, "decoding: expected one of None, slide"),
        ({"pooling": "mean"}, "pooling: expected one of avg, max"),
        ({"kernel_tokens": 4}, "kernel_tokens must be odd; got 4"),
        ({"growth_steps": 0}, "growth_steps must be an integer from 1; got 0"),
        ({"prefill_tokens": True}, "prefill_tokens must be an integer from 1; got True"),
        ({"prefill_recent_tokens": 16}, "prefill_recent_tokens must be below prefill_tokens.* got 16 and 16"),
        ({"decoding_recent_tokens": 9}, "decoding_recent_tokens must be below decoding_tokens.* got 9 and 8"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Eviction: {message}"):
        eviction(**options)


def test_a_policy_describes_what_it_evicts() -> None:
    rules = policy(prefill="h2o", decoding="slide")
    assert rules.describe() == ("no token exempt; 16 tokens of the prompt kept by h2o, 8 decoded tokens kept by slide")
    assert not rules.encodes_at_once
    assert policy().describe().endswith("no token evicted")
