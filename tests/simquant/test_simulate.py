"""Simulation: attention reads exactly what the quantizers give back, and the model is left as it was."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from helpers.models import IDS, both_stages, build, every_architecture, left_padded, logits, n_hooks
from helpers.sites import CHANNELS, Quantizers, everywhere, identity, per_channel, per_token
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.errors import MismatchError, NonFiniteError
from artifacts.model.attention import attention_layers, hooked, rotate
from artifacts.model.layout import to_rows
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site, Stage
from calib import calibrate
from calib.capture import capture
from simquant import CachePolicy, Usage, simulate

pytestmark = pytest.mark.shapes


def observers(sites: Iterable[Site], into: dict[Site, list[Tensor]]) -> dict[Site, Callable[[Tensor], None]]:
    return {site: lambda x, site=site: into.setdefault(site, []).append(x.clone()) for site in sites}


def before_and_after(
    model: nn.Module, quantizers: Mapping[Site, Quantizer], run: Callable[[], object], sink_tokens: int = 0
) -> dict[Site, tuple[Tensor, Tensor]]:
    """What went into each quantizer during `run`, and what attention got, tokens of all calls side by side."""
    before: dict[Site, list[Tensor]] = {}
    after: dict[Site, list[Tensor]] = {}
    layers = attention_layers(model)
    with (
        hooked(layers, observers(quantizers, before)),
        simulate(model, quantizers, policy=CachePolicy(sink_tokens=sink_tokens), layers=layers),
        hooked(layers, observers(quantizers, after)),
    ):
        run()
    return {site: (torch.cat(before[site], dim=2), torch.cat(after[site], dim=2)) for site in quantizers}


# --- what attention reads


@both_stages
@every_architecture
def test_identity_quantizers_leave_logits_bit_identical(kind: str, stage: Stage) -> None:
    model = build(kind)
    with simulate(model, everywhere(identity, stage)):
        assert torch.equal(logits(model), inside := logits(model))
    assert torch.equal(inside, logits(model))


@both_stages
@every_architecture
def test_attention_reads_what_the_quantizer_gives_back(kind: str, stage: Stage) -> None:
    model, quantizers = build(kind), everywhere(per_token, stage)
    seen = before_and_after(model, quantizers, lambda: logits(model))
    captured = capture(model, attention_layers(model), quantizers, IDS)
    for site, (before, after) in seen.items():
        assert torch.equal(to_rows(after), quantizers[site].simulate(to_rows(before)))
        assert not torch.equal(after, before)
        if site.layer == 0:  # nothing before it is quantized: it sees what the untouched model gives
            assert torch.equal(to_rows(after), quantizers[site].simulate(captured[site]))


@both_stages
def test_the_cache_holds_what_was_decoded(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    quantizers, layer = everywhere(per_token, stage), attention_layers(tiny_llama)[0]
    captured = capture(tiny_llama, [layer], [s for s in quantizers if s.layer == 0], IDS)
    decoded = {site: quantizers[site].simulate(x).view(2, 12, 2, 8).transpose(1, 2) for site, x in captured.items()}
    cache = DynamicCache()
    with simulate(tiny_llama, quantizers), torch.no_grad():
        tiny_llama(IDS, **cache_argument(tiny_llama, cache))
    key = decoded[Site(0, "key", stage)]
    if stage == "pre_rope":
        tables = tiny_llama.model.rotary_emb(key, torch.arange(12)[None])
        key = rotate(key, *layer.tables(tables), layer.rotation)
    assert torch.equal(cache.layers[0].keys, key)
    assert torch.equal(cache.layers[0].values, decoded[Site(0, "value")])


@both_stages
def test_nested_contexts_apply_the_outer_quantizers_first(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    outer, inner, site = per_token(4), per_token(2), Site(0, "key", stage)
    layers = attention_layers(tiny_llama)
    captured = capture(tiny_llama, layers, [site], IDS)[site]
    read: dict[Site, list[Tensor]] = {}
    with (
        simulate(tiny_llama, everywhere(lambda: outer, stage), layers=layers) as first,
        simulate(tiny_llama, everywhere(lambda: inner, stage), layers=layers) as second,
        hooked(layers, observers([site], read)),
    ):
        logits(tiny_llama)
    assert torch.equal(to_rows(read[site][0]), inner.simulate(outer.simulate(captured)))
    assert first.sites[site].n_encoded == second.sites[site].n_encoded == IDS.numel()
    assert n_hooks(tiny_llama) == 0


def test_leaving_the_inner_context_leaves_the_outer(tiny_llama: LlamaForCausalLM) -> None:
    layers = attention_layers(tiny_llama)
    with simulate(tiny_llama, everywhere(per_token), layers=layers):
        before = logits(tiny_llama)
        with simulate(tiny_llama, everywhere(lambda: per_token(2)), layers=layers):
            assert not torch.equal(logits(tiny_llama), before)
        assert torch.equal(logits(tiny_llama), before)


def test_bfloat16_models_keep_their_dtype() -> None:
    model = build("llama").bfloat16()
    exact = logits(model)
    with simulate(model, everywhere(identity)) as usage:
        assert torch.equal(logits(model), exact)
    assert usage.bits("key") == usage.bits("value") == 16
    seen = before_and_after(model, everywhere(per_token), lambda: logits(model))
    for before, after in seen.values():
        assert after.dtype == torch.bfloat16
        assert torch.equal(to_rows(after), per_token().simulate(to_rows(before)))


# --- the model afterwards


@dataclass(frozen=True, kw_only=True, eq=False)
class Failing(Identity):
    """Stops the second layer in the middle of a forward pass."""

    kind: ClassVar[str] = "failing"

    def _encode(self, x: Tensor, context: tuple[Tensor, ...]) -> object:
        raise RuntimeError("on purpose")


@both_stages
def test_the_model_is_as_it_was_afterwards(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    before, modules = logits(tiny_llama), list(tiny_llama.modules())
    with simulate(tiny_llama, everywhere(lambda: per_token(2), stage)):
        assert not torch.equal(logits(tiny_llama), before)
    assert n_hooks(tiny_llama) == 0
    assert list(tiny_llama.modules()) == modules
    assert torch.equal(logits(tiny_llama), before)


@both_stages
def test_the_model_is_as_it_was_after_an_exception_in_forward(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    before = logits(tiny_llama)
    quantizers = everywhere(per_token, stage) | {Site(1, "value"): Failing(channels=CHANNELS)}
    with pytest.raises(RuntimeError, match="on purpose"), simulate(tiny_llama, quantizers):
        logits(tiny_llama)
    assert n_hooks(tiny_llama) == 0
    assert torch.equal(logits(tiny_llama), before)


def test_the_model_is_as_it_was_after_a_refusal(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(MismatchError), simulate(tiny_llama, {Site(7, "value"): per_token()}):
        pytest.fail("the body must not run")
    assert n_hooks(tiny_llama) == 0


def test_activations_that_overflow_stop_with_the_site(tiny_llama: LlamaForCausalLM) -> None:
    artifact = calibrate(tiny_llama, IDS, "kvquant")
    with torch.no_grad():
        tiny_llama.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.value: .* NaN or infinite"), simulate(tiny_llama, artifact):
        logits(tiny_llama)


# --- sinks, padding, generation


@both_stages
@pytest.mark.parametrize("make", [per_token, per_channel])
def test_the_first_positions_stay_exact(
    make: Callable[[], Quantizer], stage: Stage, tiny_llama: LlamaForCausalLM
) -> None:
    quantizers = everywhere(make, stage)
    for before, after in before_and_after(tiny_llama, quantizers, lambda: logits(tiny_llama), sink_tokens=3).values():
        assert torch.equal(after[:, :, :3], before[:, :, :3])
        for row in range(2):  # each sequence is encoded by itself
            rows = make().simulate(to_rows(before[row : row + 1, :, 3:]))
            assert torch.equal(to_rows(after[row : row + 1, :, 3:]), rows)


def test_sinks_are_counted_from_the_first_real_token(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = left_padded(9, 5)
    run = lambda: logits(tiny_llama, ids, mask)  # noqa: E731
    for before, after in before_and_after(tiny_llama, everywhere(per_token), run, sink_tokens=2).values():
        changed = (before != after).any(dim=1).any(dim=-1)
        expected = torch.tensor([[False] * 2 + [True] * 7, [False] * 6 + [True] * 3])
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("lengths", [(10, 10), (10, 6)])
def test_sinks_stay_exact_in_generation(lengths: tuple[int, ...], tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = left_padded(*lengths)
    quantizers = everywhere(per_token)

    def run() -> None:
        tiny_llama.generate(ids, attention_mask=mask.long(), max_new_tokens=4, do_sample=False, pad_token_id=0)

    for sinks in (2, 12):  # the second: the prompt and the first new tokens
        for before, after in before_and_after(tiny_llama, quantizers, run, sink_tokens=sinks).values():
            real = nn.functional.pad(mask, (0, before.shape[2] - mask.shape[1]), value=True)
            late = (real.cumsum(1) > sinks) & real
            assert late.any()
            assert torch.equal((before != after).any(dim=1).any(dim=-1), late)
            assert torch.equal(to_rows(after)[late.view(-1)], per_token().simulate(to_rows(before)[late.view(-1)]))


def test_positions_go_on_where_the_cache_ends(tiny_llama: LlamaForCausalLM) -> None:
    cache = DynamicCache()

    @torch.no_grad()
    def run() -> None:
        for chunk in IDS.split(5, dim=1):  # the sinks end inside the second chunk
            tiny_llama(chunk, **cache_argument(tiny_llama, cache))

    for before, after in before_and_after(tiny_llama, everywhere(per_token), run, sink_tokens=7).values():
        assert torch.equal((before != after).any(dim=1).any(dim=-1), (torch.arange(12) >= 7).expand(2, -1))


@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("make", [per_token, per_channel])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_sequence_what_it_gets_alone(
    side: str, make: Callable[[], Quantizer], sink_tokens: int, tiny_llama: LlamaForCausalLM
) -> None:
    ids, mask, alone = left_padded(10, 6, 3)
    if side == "right":
        ids = torch.cat([nn.functional.pad(one, (0, 10 - one.shape[1])) for one in alone])
        mask = ids > 0
    policy = CachePolicy(sink_tokens=sink_tokens)
    with simulate(tiny_llama, everywhere(make), policy=policy) as batched:
        together = logits(tiny_llama, ids, mask)
    with simulate(tiny_llama, everywhere(make), policy=policy) as single:
        apart = [logits(tiny_llama, one)[0] for one in alone]
    for row, own in enumerate(apart):
        torch.testing.assert_close(together[row][mask[row]], own, rtol=1e-4, atol=1e-4)
    assert dict(batched.sites) == dict(single.sites)
    assert all(use.n_encoded + use.n_exact == 19 for use in batched.sites.values())


@both_stages
def test_generation_with_a_cache_equals_generation_without(stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    ids, mask, _ = left_padded(9, 5)
    options = {"attention_mask": mask.long(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    quantizers, policy = everywhere(lambda: per_token(2), stage), CachePolicy(sink_tokens=1)
    with simulate(tiny_llama, quantizers, policy=policy) as usage:
        cached = tiny_llama.generate(ids, use_cache=True, **options)
        n_encoded = {use.n_encoded for use in usage.sites.values()}
        recomputed = tiny_llama.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, recomputed)
    assert not torch.equal(cached, tiny_llama.generate(ids, **options))
    # the cache saw every real token but the last one once
    assert n_encoded == {int((cached[:, : mask.shape[1]] > 0).sum()) + 2 * (cached.shape[1] - 9 - 1) - 2}


# --- what is counted


def run_usage(model: nn.Module, quantizers: Quantizers, sink_tokens: int = 0) -> Usage:
    with simulate(model, quantizers, policy=CachePolicy(sink_tokens=sink_tokens)) as usage:
        logits(model)
    return usage


def test_usage_counts_tokens_and_the_bytes_of_the_codes(tiny_llama: LlamaForCausalLM) -> None:
    quantizers = everywhere(lambda: per_token(3))
    usage = run_usage(tiny_llama, quantizers)
    captured = capture(tiny_llama, attention_layers(tiny_llama), quantizers, IDS)
    for site, use in usage.sites.items():
        assert (use.n_encoded, use.n_exact, use.exact_bytes) == (24, 0, 0)
        assert use.encoded_bytes == quantizers[site].encode(captured[site]).nbytes
    # 16 channels of 3 bits, scale and offset of 16 bits each
    assert usage.bits("key") == usage.bits("value") == 3 + 32 / CHANNELS
    assert usage.quantized_fraction == 1
    assert usage.static_bytes("key") == 0


def test_bytes_add_up_over_calls(tiny_llama: LlamaForCausalLM) -> None:
    with simulate(tiny_llama, everywhere(per_channel)) as usage:
        for _ in range(3):
            logits(tiny_llama)
    nbytes = per_channel().encode(torch.randn(12, CHANNELS)).nbytes  # one sequence of 12 tokens
    assert {use.encoded_bytes for use in usage.sites.values()} == {3 * 2 * nbytes}


def test_quantized_fraction_is_what_a_lossy_quantizer_has_seen(tiny_llama: LlamaForCausalLM) -> None:
    assert run_usage(tiny_llama, everywhere(identity)).quantized_fraction == 0
    assert run_usage(tiny_llama, everywhere(per_token), sink_tokens=12).quantized_fraction == 0
    assert run_usage(tiny_llama, everywhere(per_token), sink_tokens=3).quantized_fraction == 9 / 12
    one_layer = everywhere(identity) | {Site(1, "value"): per_token()}
    assert run_usage(tiny_llama, one_layer).quantized_fraction == 1 / 4
    assert run_usage(tiny_llama, one_layer, sink_tokens=6).quantized_fraction == 1 / 8
    with simulate(tiny_llama, everywhere(per_token)) as unused:
        pass
    assert (unused.quantized_fraction, unused.bits("key"), unused.amortised_bits("key", 2048, 0)) == (0, 0, 0)


def test_amortised_bits_by_hand(tiny_llama: LlamaForCausalLM) -> None:
    static = Affine(channels=CHANNELS, bits=4, scale=torch.ones(CHANNELS), offset=torch.zeros(CHANNELS))
    quantizers = everywhere(identity) | {Site(0, "value"): static}
    usage = run_usage(tiny_llama, quantizers, sink_tokens=2)
    exact = 4 * CHANNELS  # bytes of a float32 token
    assert usage.static_bytes("value") == 2 * 4 * CHANNELS
    first_layer = 2 * exact + 98 * CHANNELS * 4 / 8 + 2 * 4 * CHANNELS
    expected = 8 * (first_layer + 100 * exact) / (2 * 100 * CHANNELS)
    assert usage.amortised_bits("value", 100, 2) == pytest.approx(expected)
    assert usage.amortised_bits("key", 100, 2) == 32


# --- whom an artifact fits


@pytest.fixture
def artifact(tiny_llama: LlamaForCausalLM) -> Artifact:
    return calibrate(tiny_llama, IDS, "kvquant")


def other_llama(like: LlamaForCausalLM, **changes: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(type(like.config)(**{**like.config.to_dict(), **changes})).eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, r"another model:\n  heads: artifact \[\[4, 2, 8\].*, model \[\[4, 2, 16\]"),
        ({"num_hidden_layers": 3}, r"n_layers: artifact 2, model 3"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope: artifact .*10000.* model .*500000",
        ),
        ({"vocab_size": 65}, r"vocab_size: artifact 64, model 65"),
    ],
)
def test_an_artifact_for_another_model_is_refused(
    changes: dict[str, object], message: str, artifact: Artifact, tiny_llama: LlamaForCausalLM
) -> None:
    model = other_llama(tiny_llama, **changes)
    with pytest.raises(MismatchError, match=message), simulate(model, artifact):
        pytest.fail("the body must not run")


def test_an_artifact_for_some_layers_is_refused(artifact: Artifact, tiny_llama: LlamaForCausalLM) -> None:
    some = {site: quantizer for site, quantizer in artifact.items() if site != Site(1, "value")}
    manifest = replace(artifact.manifest, specs={site: quantizer.spec for site, quantizer in some.items()})
    for quantizers in (some, Artifact(some, manifest)):
        with (
            pytest.raises(MismatchError, match=r"for every layer; missing are layers\.1\.value\. .*'identity'"),
            simulate(tiny_llama, quantizers),
        ):
            pytest.fail("the body must not run")


def test_quantizers_for_layers_that_do_not_exist_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    quantizers = everywhere(per_token) | {Site(2, "value"): per_token()}
    with (
        pytest.raises(MismatchError, match=r"got others, for layers\.2\.value"),
        simulate(tiny_llama, quantizers),
    ):
        pytest.fail("the body must not run")


def test_quantizers_of_another_width_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    with (
        pytest.raises(MismatchError, match=r"shape \(24, 16\), .* fitted on tokens of 8 channels"),
        simulate(tiny_llama, everywhere(lambda: DynamicAffine(channels=8, bits=4))),
    ):
        logits(tiny_llama)
    assert n_hooks(tiny_llama) == 0


def test_the_artifact_says_which_tokens_stay_exact(artifact: Artifact, tiny_llama: LlamaForCausalLM) -> None:
    sinks = Artifact(artifact.quantizers, replace(artifact.manifest, sink_tokens=5))
    with simulate(tiny_llama, sinks) as usage:
        logits(tiny_llama)
    assert {use.n_exact for use in usage.sites.values()} == {2 * 5}
    with simulate(tiny_llama, sinks, policy=CachePolicy()) as usage:
        logits(tiny_llama)
    assert {use.n_exact for use in usage.sites.values()} == {0}


@pytest.mark.parametrize("sink_tokens", [-1, True])
def test_a_policy_wants_a_count(sink_tokens: int) -> None:
    with pytest.raises(ValueError, match="sink_tokens must be an integer from 0; got"):
        CachePolicy(sink_tokens=sink_tokens)
