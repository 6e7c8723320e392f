"""The packed cache: codes that grow, blocks that attention reads, and a model that generates on it."""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers.caches import IDS, filled, generate, step, store_of
from helpers.models import both_stages, build, every_architecture, left_padded, n_hooks
from helpers.quantizers import QUANTIZERS, all_codes, assert_same, make, tokens
from helpers.sites import CHANNELS, everywhere, identity, per_group, per_token
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from artifacts.codes import Codes
from artifacts.errors import MismatchError
from artifacts.model.attention import attention_layers
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.streaming import Streaming
from artifacts.sites import Site, Stage
from simquant import CachePolicy, CacheStateError, ResidualWindow, packed_cache
from simquant.cache.attention.block_attention import BlockAttention, Scoring
from simquant.policy.checks import check_cacheable, group_tokens

pytestmark = pytest.mark.shapes

CAUSAL = [name for name in QUANTIZERS if make(name).tokens_per_scale == 1]
GROUPED = [name for name in QUANTIZERS if (make(name).tokens_per_scale or 1) > 1]
WINDOWS = {
    "none": CachePolicy(),
    "recent": CachePolicy(sink_tokens=2, residual_tokens=5),
    "blocks": CachePolicy(sink_tokens=1, residual_tokens=3, block_tokens=4),
}

every_window = pytest.mark.parametrize("policy", WINDOWS.values(), ids=WINDOWS)


# --- codes


@pytest.mark.parametrize("name", CAUSAL)
def test_codes_of_consecutive_runs_are_the_codes_of_the_whole(name: str) -> None:
    x, quantizer = tokens(13), make(name)
    whole = quantizer.encode(x)
    parts = Codes.cat([quantizer.encode(part) for part in x.split([5, 0, 1, 7])])
    assert_same(all_codes(parts), all_codes(whole))
    assert torch.equal(quantizer.decode(parts), quantizer.decode(whole))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_first_codes_are_the_codes_of_the_first_tokens(name: str) -> None:
    x, quantizer = tokens(13), make(name)
    whole = quantizer.encode(x)
    for n_tokens in (0, 1, 6, 13):
        assert_same(all_codes(whole.first(n_tokens)), all_codes(quantizer.encode(x[:n_tokens])))


@pytest.mark.parametrize("name", GROUPED)
def test_whole_groups_concatenate_and_are_not_divided(name: str) -> None:
    quantizer = make(name)
    group = quantizer.tokens_per_scale
    assert group is not None
    x = tokens(3 * group)
    whole = quantizer.encode(x)
    if not isinstance(quantizer, Streaming):  # which goes on from a state
        parts = Codes.cat([quantizer.encode(x[:group]), quantizer.encode(x[group:])])
        assert_same(all_codes(parts), all_codes(whole))
    with pytest.raises(ValueError, match="cannot drop"):
        whole.first(group + 1)


# --- one sequence


@every_window
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 1, 20, 1, 11]], ids=["once", "one by one", "chunks"])
def test_any_chunking_gives_the_same_store(sizes: list[int], policy: CachePolicy) -> None:
    x, quantizer = tokens(40), make("percentile-dynamic")
    store = filled(store_of(quantizer, policy), x, sizes)
    end = policy.window("key").encoded_end(40, policy.sink_tokens)
    codes = store.codes()
    assert codes is not None
    assert_same(all_codes(codes), all_codes(quantizer.encode(x[policy.sink_tokens : end])))
    expected = x.clone()
    expected[policy.sink_tokens : end] = quantizer.simulate(x[policy.sink_tokens : end])
    for start, stop in ((0, 40), (0, 1), (3, 31), (39, 40), (8, 16)):
        assert torch.equal(store.read(start, stop), expected[start:stop])
    assert torch.equal(torch.cat([store.read(*span) for span in store.spans()]), expected)
    assert (store.n_encoded, store.n_exact) == (end - policy.sink_tokens, 40 - end + policy.sink_tokens)


def test_groups_are_the_same_under_any_chunking() -> None:
    x, quantizer = tokens(40, CHANNELS), per_group()
    policy = CachePolicy(sink_tokens=3, residual_tokens=6, block_tokens=4)
    one, other = (filled(store_of(quantizer, policy), x, sizes).codes() for sizes in ([40], [1] * 40))
    assert one is not None
    assert other is not None
    assert_same(all_codes(one), all_codes(other))
    assert one.shape[0] == 28


def test_a_running_state_goes_on_from_block_to_block() -> None:
    quantizer = Streaming(channels=CHANNELS, bits=4, chunk_tokens=4, outlier_threshold_relative=1.5)
    x = tokens(40, CHANNELS)
    policy = CachePolicy(residual_tokens=2, block_tokens=4)
    for sizes in ([40], [1] * 40):
        codes = filled(store_of(quantizer, policy), x, sizes).codes()
        assert codes is not None
        assert_same(all_codes(codes), all_codes(quantizer.encode(x[:36])))


@every_window
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 9, 30, 38, 40, 99])
def test_cropping_keeps_the_first_tokens(n_tokens: int, policy: CachePolicy) -> None:
    x, quantizer = tokens(40), make("percentile-dynamic")
    store = filled(store_of(quantizer, policy), x, [40])
    before = store.read(0, 40)
    cropped = store.cropped(n_tokens)
    kept = min(n_tokens, 40)
    assert cropped.n_tokens == kept
    if kept:
        assert torch.equal(cropped.read(0, kept), before[:kept])
    assert torch.equal(store.read(0, 40), before)
    cropped.append(x[kept:])  # and it goes on as if nothing had happened
    codes, whole = cropped.codes(), store.codes()
    assert codes is not None
    assert whole is not None
    assert_same(all_codes(codes), all_codes(whole))


def test_cropping_into_a_group_is_refused() -> None:
    store = filled(store_of(per_group(), CachePolicy(block_tokens=4)), tokens(17, CHANNELS), [17])
    assert store.cropped(16).n_tokens == 16
    assert store.cropped(8).n_encoded == 8
    with pytest.raises(CacheStateError, match=r"crop to 10 tokens: 16 are encoded, in groups of 4 .*residual"):
        store.cropped(10)


def test_whole_groups_of_a_running_state_are_not_offered_for_cropping() -> None:
    quantizer = Streaming(channels=CHANNELS, bits=4, chunk_tokens=4, outlier_threshold_relative=1.5)
    store = filled(store_of(quantizer, CachePolicy(block_tokens=4)), tokens(17, CHANNELS), [17])
    with pytest.raises(CacheStateError, match="Running scales cannot go back: keep at least as many") as found:
        store.cropped(8)
    assert "whole group" not in str(found.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_store_holds_nothing_but_what_it_counts(dtype: torch.dtype) -> None:
    x = tokens(1000, dtype=dtype)
    for name in ("identity", "dynamic", "percentile-dynamic"):
        store = filled(store_of(make(name), WINDOWS["recent"], 64), x, [600, *[1] * 30, 370])
        for tensor in store.tensors():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert store.exact_bytes == (2 + 5) * x[:1].nbytes
        assert max(codes.shape[0] for codes in store.blocks) == 64


@pytest.mark.parametrize(
    ("quantizer", "policy", "message"),
    [
        (
            DynamicAffine(channels=CHANNELS, bits=4, per="channel"),
            CachePolicy(),
            "later ones included; a cache needs",
        ),
        (per_group(), CachePolicy(residual_tokens=64), r"among 4 tokens; .* got 1, .*block_tokens=4"),
        (per_group(), CachePolicy(block_tokens=6), r"got 6, .* middle of a group"),
    ],
)
def test_a_policy_that_cannot_hand_over_groups_is_refused(
    quantizer: Quantizer, policy: CachePolicy, message: str, tiny_llama: LlamaForCausalLM
) -> None:
    quantizers = everywhere(identity) | {Site(1, "key", "pre_rope"): quantizer}
    with (
        pytest.raises(MismatchError, match=rf"layers\.1\.key\.pre_rope: .*{message}"),
        packed_cache(tiny_llama, quantizers, policy=policy),
    ):
        pytest.fail("the body must not run")
    assert n_hooks(tiny_llama) == 0


def test_sites_that_are_predicted_need_one_policy_for_all() -> None:
    quantizers = {Site(1, "value"): Predicting(channels=CHANNELS)}
    check_cacheable(quantizers, CachePolicy(block_tokens=4))
    with pytest.raises(MismatchError, match=r"predicted from layers\.0\.value, whose tokens must be encoded at"):
        check_cacheable(quantizers, CachePolicy(values=ResidualWindow(residual_tokens=1)))


def test_the_group_of_several_quantizers_is_whole_for_each() -> None:
    sizes = {Site(0, "value"): 4, Site(1, "value"): 6}
    groups = {
        site: DynamicAffine(channels=CHANNELS, bits=4, per="channel", group_size=size) for site, size in sizes.items()
    }
    assert group_tokens(groups) == 12
    assert group_tokens({Site(0, "value"): per_token()}) == 1


# --- attention block by block


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_blocks_give_the_attention_of_the_whole(sinks: bool, softcap: float | None) -> None:
    query, key, value = torch.randn(6, 5, 8), torch.randn(2, 37, 8), torch.randn(2, 37, 8)
    visible = (torch.rand(5, 37) < 0.5) & (torch.arange(37) < 30)
    visible[3] = False  # sees nothing
    logits = torch.randn(6) if sinks else None
    scores = 0.3 * query @ key.repeat_interleave(3, 0).transpose(1, 2)
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).masked_fill(~visible, -torch.inf)
    extra = torch.full((6, 5, 1), -torch.inf) if logits is None else logits[:, None, None].expand(-1, 5, 1)
    weights = torch.cat([scores, extra], 2).softmax(2)[..., :-1].nan_to_num()
    expected = (weights @ value.repeat_interleave(3, 0)).transpose(0, 1)

    attention = BlockAttention(query, 2, Scoring(scaling=0.3, softcap=softcap, sink_logits=logits))
    for start in range(0, 37, 8):
        part = slice(start, start + 8)
        own = key[:, part], value[:, part]
        attention.add(lambda own=own: own[0], lambda own=own: own[1], visible[:, part])
    torch.testing.assert_close(attention.result(), expected, rtol=1e-5, atol=1e-5)


# --- a model on a packed cache


@both_stages
@every_architecture
def test_identities_give_the_logits_of_a_dynamic_cache(kind: str, stage: Stage) -> None:
    model = build(kind)
    exact, packed = [], []
    dynamic = DynamicCache(config=model.config)
    with packed_cache(model, everywhere(identity, stage), policy=CachePolicy(sink_tokens=1, residual_tokens=2)) as new:
        cache = new()
        for chunk in IDS.split([5, 1, 4, 2], dim=1):
            packed.append(step(model, cache, chunk))
    for chunk in IDS.split([5, 1, 4, 2], dim=1):
        exact.append(step(model, dynamic, chunk))
    torch.testing.assert_close(torch.cat(packed, 1), torch.cat(exact, 1), rtol=1e-4, atol=1e-5)


@both_stages
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "top_k": 8},
        {"prompt_lookup_num_tokens": 3, "max_new_tokens": 24},
    ],
    ids=["greedy", "beams", "sampled beams", "sampling", "assisted"],
)
def test_identities_generate_what_a_dynamic_cache_generates(
    options: dict[str, Any], stage: Stage, tiny_llama: LlamaForCausalLM
) -> None:
    ids, mask, _ = left_padded(9, 5)
    if "prompt_lookup_num_tokens" in options:  # transformers assists one sequence at a time
        ids, mask = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]]), torch.ones(1, 8, dtype=torch.bool)
    policy = CachePolicy(sink_tokens=1, residual_tokens=4)
    torch.manual_seed(1)
    expected = generate(tiny_llama, ids, attention_mask=mask.long(), **options)
    with packed_cache(tiny_llama, everywhere(identity, stage), policy=policy) as new:
        torch.manual_seed(1)
        found = generate(tiny_llama, ids, new(), attention_mask=mask.long(), **options)
    assert torch.equal(found, expected)


@both_stages
@every_window
def test_a_left_padded_batch_gives_each_sequence_what_it_gets_alone(
    policy: CachePolicy, stage: Stage, tiny_llama: LlamaForCausalLM
) -> None:
    ids, mask, alone = left_padded(10, 6, 3)
    with packed_cache(tiny_llama, everywhere(lambda: per_token(3), stage), policy=policy) as new:
        together, singles = new(), [new() for _ in alone]
        options = {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
        batched = step(tiny_llama, together, ids, **options)
        apart = [step(tiny_llama, cache, one) for cache, one in zip(singles, alone, strict=True)]
    for row, own in enumerate(apart):
        torch.testing.assert_close(batched[row][mask[row]], own[0], rtol=1e-4, atol=1e-4)
    for layer in range(2):
        for row, cache in enumerate(singles):
            [stream] = cache.layers[layer].store.sequences
            other = together.layers[layer].store.sequences[row]
            assert (other.key.n_tokens, other.value.n_exact) == (stream.key.n_tokens, stream.value.n_exact)
            assert other.n_padding == 10 - stream.key.n_tokens


def test_padding_behind_a_token_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        mask = torch.ones_like(IDS)
        mask[1, -2:] = 0
        with pytest.raises(MismatchError, match=r"hides 2 tokens after the first .*padding_side = 'left'"):
            step(tiny_llama, new(), IDS, attention_mask=mask)


def test_a_prompt_can_come_in_pieces_that_are_all_padding(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = left_padded(10, 3)
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        once, pieces = new(), new()
        options = {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
        whole = step(tiny_llama, once, ids, **options)
        parts = []
        for start, end in ((0, 4), (4, 8), (8, 10)):
            own = {"attention_mask": mask[:, :end].long(), "position_ids": options["position_ids"][:, start:end]}
            parts.append(step(tiny_llama, pieces, ids[:, start:end], **own))
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], rtol=1e-4, atol=1e-4)


def test_a_sliding_window_forgets_what_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simquant.cache.store.layer_store.BLOCK_TOKENS", 4)
    model = build("gemma3_text")
    dynamic = DynamicCache(config=model.config)
    ids = torch.randint(3, 64, (1, 40))
    expected = torch.cat([step(model, dynamic, chunk) for chunk in ids.split(1, dim=1)], 1)
    with packed_cache(model, everywhere(identity)) as new:
        cache = new()
        found = torch.cat([step(model, cache, chunk) for chunk in ids.split(1, dim=1)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        sliding, full = (layer.store.sequences[0].key for layer in cache.layers)
        assert sliding.n_tokens == full.n_tokens == full.n_encoded == 40
        assert sliding.n_encoded <= 4 + 3 * 4  # the window, and less than two blocks before it
        cache.crop(-4)
        assert step(model, cache, ids[:, 36:]).isfinite().all()
        with pytest.raises(CacheStateError, match=r"cannot crop to 10 tokens: .* sliding window has dropped"):
            cache.crop(-30)


@both_stages
def test_exact_prefill_reads_exact_keys_and_values(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    exact = step(tiny_llama, DynamicCache(), IDS)
    for exact_prefill in (True, False):
        policy = CachePolicy(exact_prefill=exact_prefill)
        with packed_cache(tiny_llama, everywhere(lambda: per_token(2), stage), policy=policy) as new:
            cache = new()
            first = step(tiny_llama, cache, IDS)
            second = step(tiny_llama, cache, IDS[:, :1])
        assert torch.allclose(first, exact, atol=1e-5) == exact_prefill
        assert second.isfinite().all()
        assert cache.layers[0].store.sequences[0].key.n_encoded == 13


def test_exact_prefill_and_quantized_prefill_store_the_same_codes_in_the_first_layer(
    tiny_llama: LlamaForCausalLM,
) -> None:
    codes = []
    for exact_prefill in (True, False):
        with packed_cache(tiny_llama, everywhere(per_token), policy=CachePolicy(exact_prefill=exact_prefill)) as new:
            cache = new()
            step(tiny_llama, cache, IDS)
            codes.append(cache.layers[0].store.sequences[0].key.codes())
    assert_same(all_codes(codes[0]), all_codes(codes[1]))


# --- the cache as an object


def test_rows_are_reordered_selected_and_repeated_without_copies(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        cache = new()
        step(tiny_llama, cache, IDS)
        nbytes = cache.nbytes
        expected = step(tiny_llama, cache, IDS[:, :1])
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        assert cache.nbytes == nbytes
        repeated = step(tiny_llama, cache, IDS[:, :1].repeat_interleave(2, 0))
        torch.testing.assert_close(repeated, expected.repeat_interleave(2, 0))
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([3, 0, 0]))
        reordered = step(tiny_llama, cache, IDS[[1, 0, 0], :1])
        torch.testing.assert_close(reordered, expected[[1, 0, 0]])
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([False, True, False]))
        torch.testing.assert_close(step(tiny_llama, cache, IDS[:1, :1]), expected[:1])


@both_stages
def test_cropping_takes_back_a_step(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token, stage), policy=CachePolicy(residual_tokens=3)) as new:
        cache = new()
        step(tiny_llama, cache, IDS)
        first = step(tiny_llama, cache, IDS[:, :1])
        for length in (12, -1, torch.tensor(-1)):  # as transformers 5.17 and as later releases ask
            cache.crop(length)
            assert cache.get_seq_length() == 12
            assert torch.equal(step(tiny_llama, cache, IDS[:, :1]), first)


def test_a_reset_cache_is_as_new(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        cache = new()
        first = step(tiny_llama, cache, IDS)
        cache.reset()
        assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
        assert torch.equal(step(tiny_llama, cache, IDS), first)


def test_an_offloaded_layer_comes_back(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        cache, other = new(), new()
        step(tiny_llama, cache, IDS)
        step(tiny_llama, other, IDS)
        cache.offload(0)
        assert torch.equal(step(tiny_llama, cache, IDS[:, :1]), step(tiny_llama, other, IDS[:, :1]))


@both_stages
def test_nbytes_is_what_the_process_holds(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 64, (1, 100))
    with packed_cache(tiny_llama, everywhere(per_token, stage), policy=CachePolicy(residual_tokens=4)) as new:
        cache = new()
        for chunk in ids.split([80, *[1] * 20], dim=1):
            step(tiny_llama, cache, chunk)
    gc.collect()
    # Every tensor that is alive and belongs to no model, counted by the collector and not by the cache.
    held: dict[int, int] = {}
    known = {p.untyped_storage().data_ptr() for p in [*tiny_llama.parameters(), *tiny_llama.buffers(), ids]}
    for tensor in tensors_below(cache):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
    assert sum(held.values()) == pytest.approx(cache.nbytes, rel=0.05)
    tables = 2 * 100 * 8 * 4 if stage == "pre_rope" else 0
    encoded = 96 * (CHANNELS * 4 // 8 + 4)
    assert cache.nbytes == tables + 4 * (encoded + 4 * CHANNELS * 4)


def tensors_below(thing: object) -> Iterator[Tensor]:
    """All tensors that can be reached from an object, without going through models, modules and functions."""
    seen, todo = set(), [thing]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, nn.Module | type | Callable):  # type: ignore[arg-type]
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
            continue
        todo += gc.get_referents(one)


# --- bad input and faults


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicting(Identity):
    """Wants the values of the layer below."""

    kind: ClassVar[str] = "predicting"
    sources: ClassVar[tuple[Site, ...]] = (Site(0, "value"),)


@dataclass(frozen=True, kw_only=True, eq=False)
class Failing(Identity):
    """Stops the second layer in the middle of a step."""

    kind: ClassVar[str] = "failing"

    def _encode(self, x: Tensor, context: tuple[Tensor, ...]) -> Codes:
        if len(x) == 1:
            raise RuntimeError("on purpose")
        return super()._encode(x, context)


@pytest.mark.parametrize("site", [Site(1, "value"), Site(1, "key", "pre_rope")], ids=str)
def test_a_half_written_step_is_found_at_the_next_update(site: Site, tiny_llama: LlamaForCausalLM) -> None:
    before = step(tiny_llama, DynamicCache(), IDS)
    with packed_cache(tiny_llama, everywhere(per_token) | {site: Failing(channels=CHANNELS)}) as new:
        cache = new()
        step(tiny_llama, cache, IDS)
        with pytest.raises(RuntimeError, match="on purpose"):
            step(tiny_llama, cache, IDS[:, :1])
        with pytest.raises(CacheStateError, match=r"layers\.0: .* an earlier step that failed between two layers"):
            step(tiny_llama, cache, IDS[:, :2])
        cache.reset()
        step(tiny_llama, cache, IDS)
    assert torch.equal(step(tiny_llama, DynamicCache(), IDS), before)


def interrupted(model: nn.Module, cache: object, ids: Tensor) -> None:
    """A step that stops between the hook of the attention module and the update of the cache."""

    def stop(*args: object) -> None:
        raise RuntimeError("on purpose")

    hook = model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="on purpose"):
        step(model, cache, ids)
    hook.remove()


@pytest.mark.parametrize("first", [0, 5])
def test_a_step_that_stopped_before_the_cache_was_written_can_be_repeated(
    first: int, tiny_llama: LlamaForCausalLM
) -> None:
    """Its cosines and sines are not those of later tokens."""
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        sound, cache = new(), new()
        for part in (IDS[:, :first], IDS[:, first:9], IDS[:, 9:]):
            if part.shape[1]:
                interrupted(tiny_llama, cache, part)
                assert torch.equal(step(tiny_llama, cache, part), step(tiny_llama, sound, part))
    assert cache.nbytes == sound.nbytes


def test_what_a_step_that_stopped_had_brought_is_no_other_models(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        cache = new()
        interrupted(tiny_llama, cache, IDS)
        with pytest.raises(MismatchError, match="not inside the `packed_cache` context"):
            cache.update(torch.zeros(2, 2, 12, 8), torch.zeros(2, 2, 12, 8), 0)
    assert n_hooks(tiny_llama) == 0


def test_an_exception_inside_attention_leaves_the_model_unpatched(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, implementation = step(tiny_llama, DynamicCache(), IDS), tiny_llama.config._attn_implementation

    def failing(*args: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("simquant.cache.attention.block_attention.BlockAttention.add", failing)
    with pytest.raises(RuntimeError, match="on purpose"), packed_cache(tiny_llama, everywhere(per_token)) as new:
        step(tiny_llama, new(), IDS)
    assert n_hooks(tiny_llama) == 0
    assert tiny_llama.config._attn_implementation == implementation
    assert torch.equal(step(tiny_llama, DynamicCache(), IDS), before)


def test_another_model_cannot_use_the_cache(tiny_llama: LlamaForCausalLM) -> None:
    config = tiny_llama.config
    others = {
        "2 heads of 8 channels, .*; got 4 of 8": {"num_key_value_heads": 4},
        "2 heads of 8 channels, .*; got 2 of 16": {"head_dim": 16},
        "expected one of the layers that the cache was made for": {"num_hidden_layers": 3},
        "not inside the `packed_cache` context": {},
    }
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        for message, changes in others.items():
            torch.manual_seed(0)
            other = LlamaForCausalLM(type(config)(**{**config.to_dict(), **changes})).eval()
            cache = new()
            if "num_hidden_layers" in changes:
                with pytest.raises(MismatchError, match=message):
                    cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 2)
                continue
            with pytest.raises(MismatchError, match=message):
                step(other, cache, IDS)
        with packed_cache(other, everywhere(per_token)) as other_new:
            with pytest.raises(MismatchError, match="got a packed cache of another context"):
                step(other, new(), IDS)
            assert step(other, other_new(), IDS).isfinite().all()
    with pytest.raises(MismatchError, match="not inside the `packed_cache` context"):
        step(tiny_llama, new(), IDS)


def test_a_cache_does_not_outlive_its_context(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        cache = new()
        step(tiny_llama, cache, IDS)
    nbytes = cache.nbytes
    with pytest.raises(MismatchError, match="not inside the `packed_cache` context of the cache"):
        step(tiny_llama, cache, IDS[:, :1])
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        for _ in range(2):
            with pytest.raises(MismatchError, match=r"layers\.0: .* got a packed cache of another context"):
                step(tiny_llama, cache, IDS[:, :1])
            cache.reset()  # empty as it is then, it still belongs to the other context
        assert step(tiny_llama, new(), IDS).isfinite().all()
    assert nbytes > 0


def test_a_crop_that_one_layer_refuses_changes_no_layer(tiny_llama: LlamaForCausalLM) -> None:
    quantizers = everywhere(per_token) | {Site(1, "value"): per_group()}
    policy = CachePolicy(block_tokens=4)
    with packed_cache(tiny_llama, quantizers, policy=policy) as new:
        cache, other = new(), new()
        for one in (cache, other):
            step(tiny_llama, one, IDS)
        with pytest.raises(CacheStateError, match=r"layers\.1\.value|dynamic_affine: .* groups of 4"):
            cache.crop(-2)
        assert cache.get_seq_length() == 12
        assert torch.equal(step(tiny_llama, cache, IDS[:, :1]), step(tiny_llama, other, IDS[:, :1]))
        cache.crop(-5)
        assert [layer.store.n_columns for layer in cache.layers] == [8, 8]


def test_inside_the_context_other_caches_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    layers = attention_layers(tiny_llama)
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        for cache in (None, DynamicCache()):
            with pytest.raises(MismatchError, match=r"from new_cache\(\) of the context.*got (NoneType|DynamicCache)"):
                tiny_llama(IDS, **cache_argument(tiny_llama, cache), use_cache=False)
        with (
            pytest.raises(MismatchError, match="do not nest"),
            packed_cache(tiny_llama, everywhere(per_token), layers=layers),
        ):
            pass
        cache = new()
        step(tiny_llama, cache, IDS)
        with pytest.raises(MismatchError, match=r"a batch of 2 sequences, .*; got 1"):
            step(tiny_llama, cache, IDS[:1])


def test_two_caches_of_one_context_do_not_mix(tiny_llama: LlamaForCausalLM) -> None:
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        alone = new()
        expected = [step(tiny_llama, alone, chunk) for chunk in IDS[:1].split(4, dim=1)]
        one, other = new(), new()
        for chunk, reverse, own in zip(IDS[:1].split(4, 1), IDS[1:].flip(1).split(4, 1), expected, strict=True):
            assert torch.equal(step(tiny_llama, one, chunk), own)
            step(tiny_llama, other, reverse)


@every_window
def test_copies_of_a_prompt_go_on_by_themselves(policy: CachePolicy, tiny_llama: LlamaForCausalLM) -> None:
    """As transformers' documentation shares prefixes: `copy.deepcopy` failed on the options of a quantizer."""
    prompt, ends = IDS[:1], [torch.tensor([[7, 8, 9]]), torch.tensor([[30, 31, 32, 33, 34]])]
    quantizers = everywhere(per_token)
    with packed_cache(tiny_llama, quantizers, policy=policy) as new:
        expected = []
        for end in ends:
            alone = new()
            step(tiny_llama, alone, prompt)
            expected.append([step(tiny_llama, alone, token) for token in end.split(1, dim=1)])
        shared = new()
        step(tiny_llama, shared, prompt)
        copies, nbytes = [copy.deepcopy(shared) for _ in ends], shared.nbytes
        for index in range(5):
            for cache, end, own in zip(copies, ends, expected, strict=True):
                if index < end.shape[1]:
                    assert torch.equal(step(tiny_llama, cache, end[:, index : index + 1]), own[index])
        assert shared.get_seq_length() == 12
        assert shared.nbytes == nbytes
        assert torch.equal(step(tiny_llama, shared, ends[0][:, :1]), expected[0][0])
        for cache in copies:
            for layer in cache.layers:
                assert all(store.quantizer is quantizers[site] for site, store in layer.store.stores())


def test_a_copy_takes_a_shared_prompt_into_generate(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.cat([IDS[:1], torch.tensor([[7, 8]])], dim=1)
    with packed_cache(tiny_llama, everywhere(per_token)) as new:
        prompt, alone = new(), new()
        step(tiny_llama, prompt, IDS[:1])
        step(tiny_llama, alone, IDS[:1])
        expected = generate(tiny_llama, ids, alone)
        for _ in range(2):
            assert torch.equal(generate(tiny_llama, ids, copy.deepcopy(prompt)), expected)


@pytest.mark.parametrize("field", ["sink_tokens", "residual_tokens", "block_tokens"])
def test_a_policy_wants_counts(field: str) -> None:
    for value in (-1, True):
        with pytest.raises(ValueError, match=f"CachePolicy: {field} must be an integer from"):
            CachePolicy(**{field: value})
    with pytest.raises(ValueError, match="ResidualWindow: block_tokens must be an integer from 1; got 0"):
        ResidualWindow(block_tokens=0)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_an_exact_prefill_is_true_or_false(value: object) -> None:
    policy = CachePolicy()
    object.__setattr__(policy, "exact_prefill", value)  # past the types, which only the tests check
    with pytest.raises(ValueError, match="CachePolicy: exact_prefill must be true or false; got"):
        policy.__post_init__()


def test_a_policy_describes_itself() -> None:
    assert CachePolicy().describe() == "no token exempt"
    assert CachePolicy(sink_tokens=1, residual_tokens=8).describe() == "first token exact, last 8 tokens exact"
    kivi = CachePolicy(residual_tokens=1, block_tokens=32, values=ResidualWindow(residual_tokens=33))
    assert kivi.describe() == ("keys: last token exact and encoded in blocks of 32, values: last 33 tokens exact")
    assert [kivi.exact_tokens("key", n) for n in (32, 33, 64, 65)] == [32, 1, 32, 1]
    assert [kivi.exact_tokens("value", n) for n in (32, 33, 34)] == [32, 33, 33]
