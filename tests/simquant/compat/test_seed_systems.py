"""The systems that users come from, under the names that they know, with true numbers."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import both_stages, build, left_padded, logits, n_hooks
from helpers.sites import CHANNELS, everywhere, per_channel, per_token
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel

from artifacts.artifact import Artifact
from artifacts.errors import MismatchError
from artifacts.model.layout import to_rows
from artifacts.model.transformers_release import cache_argument, returned_cache
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.sparse import ThresholdSparse
from artifacts.sites import Site, Stage
from calib import calibrate
from calib.recipe.recipe import Recipe
from kvgauge.cli import evaluate as evaluate_program
from kvgauge.compat import CompressedModel, load_with_kivi
from kvgauge.loading.models import LoadedModel
from simquant import (
    CachePolicy,
    CacheStateError,
    FakeQuantCache,
    KIVICache,
    KIVISettings,
    fake_quant_cache,
    memory_savings,
    packed_cache,
    patch_model,
    simulate,
    unpatch_model,
)

pytestmark = pytest.mark.shapes

IDS = torch.arange(3, 43).reshape(2, 20)
ONE = IDS[:1]
SMALL = {"k_bits": 2, "v_bits": 2, "group_size": 4, "residual_length": 6}
EXACT = {**SMALL, "k_bits": 16, "v_bits": 16}


def qwen2() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = CONFIG_MAPPING["qwen2"](**sizes, num_hidden_layers=2, vocab_size=64, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


every_model = pytest.mark.parametrize("make", [lambda: build("llama"), qwen2], ids=["llama", "qwen2"])


@torch.no_grad()
def step(model: nn.Module, cache: object, ids: Tensor) -> Tensor:
    return model(input_ids=ids, **cache_argument(model, cache), use_cache=True).logits


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    return model.generate(ids, **{"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options})


# --- KIVI for Qwen and Llama


def naive(x: Tensor, bits: int, dim: int) -> Tensor:
    """KIVI of one group along `dim`: asymmetric, the zero point neither rounded nor clamped."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-5)
    return ((x - low) / scale).round() * scale + low


@every_model
@pytest.mark.parametrize("bits", [2, 4])
def test_keys_are_grouped_over_tokens_and_values_over_channels(make: Callable[[], PreTrainedModel], bits: int) -> None:
    model, plain, n_quantized = make(), DynamicCache(), (20 - 6) // 4 * 4
    step(model, plain, ONE)
    with KIVICache(model, **{**SMALL, "k_bits": bits, "v_bits": bits}) as cache:
        step(model, cache, ONE)
    stream = cache.layers[0].store.sequences[0]
    for store, exact, dim in ((stream.key, plain.layers[0].keys, 1), (stream.value, plain.layers[0].values, 2)):
        rows = to_rows(exact)
        groups = rows[:n_quantized].reshape((-1, 4, CHANNELS) if dim == 1 else (n_quantized, -1, 4))
        expected = naive(groups, bits, dim).view(-1, CHANNELS)
        near = (store.read(0, n_quantized) - expected).abs() < 0.01 * rows.abs().max()
        assert near.float().mean() > 0.98  # the others lie between two levels, and float16 parameters chose
        assert torch.equal(store.read(n_quantized, 20), rows[n_quantized:])


def test_a_group_far_from_zero_keeps_its_bits() -> None:
    x, settings = 5 + 0.1 * torch.randn(32, CHANNELS), KIVISettings(k_bits=2, v_bits=2, group_size=8)
    for quantizer, dim in ((settings.key_quantizer(CHANNELS), 1), (settings.value_quantizer(CHANNELS, 8), 2)):
        groups = x.view((4, 8, CHANNELS) if dim == 1 else (32, 2, 8))
        step_size = (groups.amax(dim) - groups.amin(dim)).max() / 3
        assert (quantizer.simulate(x) - x).abs().max() <= 0.55 * step_size


@every_model
def test_sixteen_bits_are_exact(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    expected = generate(model, IDS)
    with KIVICache(model, **EXACT) as cache:
        assert torch.equal(generate(model, IDS, **cache_argument(model, cache)), expected)
        info = cache.get_cache_info()
    assert (info["quantized_len"], info["effective_bits"], info["memory_ratio"]) == (0, 32, 1)
    with KIVICache(model, **{**EXACT, "v_bits": 2}) as cache:
        generate(model, IDS, **cache_argument(model, cache))
        info = cache.get_cache_info()
    assert info["quantized_len"] == (31 - 6) // 4 * 4
    assert 16 < info["effective_bits"] < 32


@every_model
def test_the_streaming_loop_says_what_generate_says(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    with KIVICache(model, **SMALL) as cache:
        generated = ONE.clone()
        for _ in range(12):
            current = generated if cache.get_seq_length() == 0 else generated[:, -1:]
            chosen = step(model, cache, current)[:, -1].argmax(dim=-1, keepdim=True)
            generated = torch.cat([generated, chosen], dim=-1)
        info = cache.get_cache_info()
        cache.reset()
        assert torch.equal(generate(model, ONE, **cache_argument(model, cache), eos_token_id=None), generated)
        assert cache.get_cache_info() == info


def test_cache_info_counts_what_is_held(tiny_llama: LlamaForCausalLM) -> None:
    with KIVICache(tiny_llama, **SMALL) as cache:
        empty = cache.get_cache_info()
        step(tiny_llama, cache, ONE)
        info = cache.get_cache_info()
    assert (empty["total_seq_len"], empty["quantized_len"], empty["residual_len"], empty["size_bytes"]) == (0, 0, 0, 0)
    assert {name: info[name] for name in SMALL} == SMALL
    assert (info["num_layers"], info["total_seq_len"], info["quantized_len"], info["residual_len"]) == (2, 20, 12, 8)
    counted = (12 * (2 + 32 / 4) + 8 * 32) / 20
    assert info["effective_bits"] == pytest.approx(counted)
    assert info["memory_ratio"] == pytest.approx(counted / 32)
    assert info["size_bytes"] == cache.nbytes == pytest.approx(counted / 8 * 20 * CHANNELS * 4)


def test_beams_are_reordered(tiny_llama: LlamaForCausalLM) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 3}
    expected = generate(tiny_llama, IDS, **beams)
    with KIVICache(tiny_llama, **EXACT) as cache:
        assert torch.equal(generate(tiny_llama, IDS, **cache_argument(tiny_llama, cache), **beams), expected)
    with KIVICache(tiny_llama, **SMALL) as cache:
        step(tiny_llama, cache, IDS)
        before = [stream.key.read(0, 20) for stream in cache.layers[1].store.sequences]
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        after = [stream.key.read(0, 20) for stream in cache.layers[1].store.sequences]
        assert all(torch.equal(after[row], before[old]) for row, old in enumerate([1, 0, 1]))
        cache.reset()
        assert generate(tiny_llama, IDS, **cache_argument(tiny_llama, cache), **beams).shape == expected.shape


def test_a_patched_model_has_a_fresh_cache_for_each_call(tiny_llama: LlamaForCausalLM) -> None:
    plain, plain_logits = generate(tiny_llama, IDS), logits(tiny_llama)
    with KIVICache(tiny_llama, **SMALL) as cache:
        expected = generate(tiny_llama, IDS, **cache_argument(tiny_llama, cache))
    before, implementation = set(vars(tiny_llama)), tiny_llama.config._attn_implementation
    patch_model(tiny_llama, **SMALL)
    results = [generate(tiny_llama, IDS, return_dict_in_generate=True) for _ in range(2)]
    for result in results:
        assert torch.equal(result.sequences, expected)
        assert isinstance(returned_cache(result), KIVICache)
        assert returned_cache(result).get_cache_info()["quantized_len"] == (31 - 6) // 4 * 4
    assert returned_cache(results[0]) is not returned_cache(results[1])
    assert torch.equal(generate(tiny_llama, IDS, **cache_argument(tiny_llama, DynamicCache())), plain)
    assert torch.equal(generate(tiny_llama, IDS, use_cache=False), plain)
    assert torch.equal(logits(tiny_llama), plain_logits)
    assert (n_hooks(tiny_llama), tiny_llama.config._attn_implementation) == (0, implementation)
    with pytest.raises(ValueError, match="is patched already; call unpatch_model"):
        patch_model(tiny_llama)
    unpatch_model(tiny_llama)
    unpatch_model(tiny_llama)
    assert set(vars(tiny_llama)) == before
    assert torch.equal(generate(tiny_llama, IDS), plain)


def test_a_patched_model_without_injection_offers_caches_only(tiny_llama: LlamaForCausalLM) -> None:
    plain = generate(tiny_llama, IDS)
    patch_model(tiny_llama, auto_inject_cache=False, **SMALL)
    assert torch.equal(generate(tiny_llama, IDS), plain)
    with tiny_llama.new_kivi_cache() as cache:
        step(tiny_llama, cache, IDS)
    assert cache.settings == KIVISettings(**SMALL)


def test_a_copy_of_a_patched_model_generates_by_itself(tiny_llama: LlamaForCausalLM) -> None:
    patch_model(tiny_llama, **EXACT)
    expected, other = generate(tiny_llama, IDS), copy.deepcopy(tiny_llama)
    nn.init.zeros_(tiny_llama.lm_head.weight)
    assert torch.equal(generate(other, IDS), expected)
    assert not torch.equal(generate(tiny_llama, IDS), expected)


def test_a_model_is_loaded_with_kivi() -> None:
    model, tokenizer = load_with_kivi("demo", device="cpu", k_bits=2, v_bits=2, residual_length=32)
    inputs = tokenizer("One day the " * 30, return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    info = returned_cache(model.generate(**inputs, **options)).get_cache_info()
    assert (info["k_bits"], info["residual_length"]) == (2, 32)
    assert info["quantized_len"] >= 32
    assert info["effective_bits"] < 32
    with pytest.raises(ValueError, match="KIVI: k_bits"):
        load_with_kivi("no/such-model", k_bits=9)


def test_savings_are_those_of_a_cache_and_grow_with_the_text(tiny_llama: LlamaForCausalLM) -> None:
    with KIVICache(tiny_llama, **SMALL) as cache:
        step(tiny_llama, cache, ONE)
    found = memory_savings(20, head_dim=8, dtype=torch.float32, **SMALL)
    assert found["memory_ratio"] == pytest.approx(cache.get_cache_info()["memory_ratio"])
    assert found["compression_ratio"] == pytest.approx(found["plain_bytes"] / found["size_bytes"])
    ratios = [memory_savings(n)["compression_ratio"] for n in (100, 1024, 8192)]
    assert 1 == ratios[0] < ratios[1] < ratios[2] < 16 / 3
    assert memory_savings(1024, k_bits=16, v_bits=16)["effective_bits"] == 16
    with pytest.raises(ValueError, match="seq_len must be an integer from 1; got 0"):
        memory_savings(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_bits": 0}, "k_bits must be an integer from 1 to 8, or 16 for full precision; got 0"),
        ({"v_bits": 12}, "v_bits must be .* got 12"),
        ({"group_size": 1}, "group_size must be an integer from 2; got 1"),
        ({"residual_length": -1}, "residual_length must be an integer from 0; got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str, tiny_llama: nn.Module) -> None:
    for use in (KIVICache, patch_model):
        with pytest.raises(ValueError, match=message):
            use(tiny_llama, **settings)
    assert n_hooks(tiny_llama) == 0


def test_a_model_has_several_open_kivi_caches(tiny_llama: LlamaForCausalLM) -> None:
    """A second one was refused, so that a patched model could not generate while a cache of it was open."""
    settings = [SMALL, {**SMALL, "v_bits": 4, "residual_length": 3}]
    expected = []
    for own in settings:
        with KIVICache(tiny_llama, **own) as cache:
            expected.append(torch.cat([step(tiny_llama, cache, part) for part in IDS.split(5, dim=1)], dim=1))
    patch_model(tiny_llama, **SMALL)
    generated = generate(tiny_llama, IDS)
    one, other = (KIVICache(tiny_llama, **own) for own in settings)
    found = [[step(tiny_llama, cache, part) for cache in (one, other)] for part in IDS.split(5, dim=1)]
    for logits_of_one, wanted in zip(zip(*found, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(logits_of_one, dim=1), wanted)
    assert torch.equal(generate(tiny_llama, IDS), generated)
    one.close()
    one.close()
    assert step(tiny_llama, other, IDS[:, :1]).isfinite().all()
    assert n_hooks(tiny_llama) > 0
    other.close()
    assert n_hooks(tiny_llama) == 0


def test_a_forgotten_kivi_cache_leaves_its_model(tiny_llama: LlamaForCausalLM) -> None:
    """One that was never closed kept its model from having another for ever."""
    cache = KIVICache(tiny_llama, **SMALL)
    del cache
    assert n_hooks(tiny_llama) == 0
    with KIVICache(tiny_llama, **SMALL) as cache:
        step(tiny_llama, cache, IDS)


def test_a_copied_kivi_cache_goes_on_while_the_first_is_open(tiny_llama: LlamaForCausalLM) -> None:
    with KIVICache(tiny_llama, **SMALL) as cache:
        step(tiny_llama, cache, IDS)
        with copy.deepcopy(cache) as other:
            assert torch.equal(step(tiny_llama, other, IDS[:, :1]), step(tiny_llama, cache, IDS[:, :1]))
        assert other.get_cache_info() == cache.get_cache_info()
        assert step(tiny_llama, cache, IDS[:, :1]).isfinite().all()
    assert n_hooks(tiny_llama) == 0


def test_a_closed_kivi_cache_takes_nothing(tiny_llama: LlamaForCausalLM) -> None:
    with KIVICache(tiny_llama, **SMALL) as cache:
        step(tiny_llama, cache, IDS)
    with pytest.raises(MismatchError, match="not inside the `packed_cache` context"):
        step(tiny_llama, cache, IDS[:, :1])
    with pytest.raises(RuntimeError, match="on purpose"), KIVICache(tiny_llama, **SMALL):
        raise RuntimeError("on purpose")
    assert n_hooks(tiny_llama) == 0


@pytest.mark.parametrize("protocol", ["decode", "cache"])
def test_the_kivi_recipe_is_evaluated_as_kivi_keeps_tokens(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--recipe", "kivi-2", "--protocol", protocol, "--seqlen", "160", "--limit", "1", "--device", "cpu"]
    assert evaluate_program.main(["demo", *flags, "--prefill-tokens", "144", "--chunk-tokens", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits"]["key"] == found["bits"]["value"] == 3
    assert found["quantized_fraction"] == (128 + 160 - 129) / (2 * 160)
    assert "keys: last token exact and encoded in blocks of 128, values: last 129 tokens exact" in found["protocol"]
    assert "exact prefill attention" in found["protocol"]
    assert "NOT CAUSAL" not in found["protocol"]


# --- msModelSlim: any cache with update(key, value, layer_idx)


class OwnCache:
    """No transformers cache: the least that an attention asks for."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if layer_idx in self.held:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.held[layer_idx], (key, value), strict=True))
        self.held[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held[layer_idx][0].shape[2] if layer_idx in self.held else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    is_compileable = False
    is_sliding = (False,)


def static(bits: int = 8) -> dict[Site, Quantizer]:
    scales = torch.linspace(0.02, 0.1, CHANNELS)
    return everywhere(lambda: Affine(channels=CHANNELS, bits=bits, scale=scales), "post_rope")


@pytest.mark.parametrize("make", [DynamicCache, OwnCache], ids=["transformers", "own"])
def test_any_cache_gives_the_logits_of_simulation(make: Callable[[], Any], tiny_llama: LlamaForCausalLM) -> None:
    quantizers = static(4)
    with simulate(tiny_llama, quantizers):
        expected = logits(tiny_llama, IDS)
    assert not torch.allclose(expected, logits(tiny_llama, IDS), atol=1e-2)
    with fake_quant_cache(make(), quantizers) as cache:
        parts = [step(tiny_llama, cache, part) for part in IDS.split([15, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20


def test_what_is_cached_is_quantized_once(tiny_llama: LlamaForCausalLM) -> None:
    plain, inner, quantizers = DynamicCache(), DynamicCache(), static(3)
    step(tiny_llama, plain, IDS)
    step(tiny_llama, fake_quant_cache(inner, quantizers), IDS)
    for held, exact, site in (("keys", plain.layers[0].keys, Site(0, "key", "post_rope")), ("values", None, None)):
        exact = plain.layers[0].values if exact is None else exact
        site = site or Site(0, "value")
        assert torch.equal(to_rows(getattr(inner.layers[0], held)), quantizers[site].simulate(to_rows(exact)))


def test_a_fake_quantized_cache_generates(tiny_llama: LlamaForCausalLM) -> None:
    exact = everywhere(lambda: Identity(channels=CHANNELS), "post_rope")
    for options in ({}, {"num_beams": 3}):
        with fake_quant_cache(DynamicCache(), exact) as cache:
            found = generate(tiny_llama, IDS, **cache_argument(tiny_llama, cache), **options)
        assert torch.equal(found, generate(tiny_llama, IDS, **options))


def test_a_fake_quantized_cache_is_copied_without_its_quantizers(tiny_llama: LlamaForCausalLM) -> None:
    """A deep copy failed on the options of a quantizer."""
    quantizers = static(3)
    cache, alone = (fake_quant_cache(DynamicCache(), quantizers) for _ in range(2))
    for one in (cache, alone):
        step(tiny_llama, one, IDS)
    other = copy.deepcopy(cache)
    assert torch.equal(step(tiny_llama, other, IDS[:, :1]), step(tiny_llama, alone, IDS[:, :1]))
    assert (cache.get_seq_length(), other.get_seq_length()) == (20, 21)
    assert all(copy.deepcopy(quantizer) is quantizer for quantizer in quantizers.values())
    specs = [quantizer.spec for quantizer in quantizers.values()]
    assert copy.deepcopy(specs) == pickle.loads(pickle.dumps(specs)) == specs


def test_calibration_reads_every_batch_at_the_update(tiny_llama: LlamaForCausalLM) -> None:
    recipe = {"stage": "post_rope", "key": {"method": "uniform", "bits": 8, "per": "channel", "symmetric": True}}
    whole = {"name": "int8", "source": "here", **recipe, "value": recipe["key"]}
    artifact = calibrate(tiny_llama, IDS, Recipe.parse(whole, "here"))
    plain = DynamicCache()
    step(tiny_llama, plain, IDS)
    largest = to_rows(plain.layers[0].keys).abs().amax(dim=0)
    scale = artifact[Site(0, "key", "post_rope")].tensors()["scale"]
    torch.testing.assert_close(scale, largest / 127, rtol=1e-2, atol=1e-6)
    with fake_quant_cache(DynamicCache(), artifact) as cache:
        torch.testing.assert_close(step(tiny_llama, cache, IDS), logits(tiny_llama, IDS), rtol=0.1, atol=0.1)
    sinks = Artifact(artifact.quantizers, replace(artifact.manifest, sink_tokens=2))
    with pytest.raises(MismatchError, match="got sink_tokens=2"):
        fake_quant_cache(DynamicCache(), sinks)


def test_a_cache_that_is_never_updated_is_an_error(tiny_llama: LlamaForCausalLM) -> None:
    with (
        pytest.raises(CacheStateError, match=r"layers\.0, layers\.1: attention never called cache\.update\("),
        fake_quant_cache(DynamicCache(), static()),
    ):
        logits(tiny_llama)
    more = static() | {Site(2, "key", "post_rope"): static()[Site(0, "key", "post_rope")]}
    cache = fake_quant_cache(DynamicCache(), more)
    step(tiny_llama, cache, IDS)
    with pytest.raises(CacheStateError, match=r"^layers\.2: attention never called"):
        cache.check_updated()
    with pytest.raises(RuntimeError, match="on purpose"), fake_quant_cache(DynamicCache(), static()):
        raise RuntimeError("on purpose")


class TwoArguments:
    def update(self, key: Tensor, value: Tensor) -> None: ...


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (object(), r"expected a cache with the method update\(key_states, value_states, layer_idx\); got object, "),
        (TwoArguments(), r"update\(key_states, value_states, layer_idx\); got TwoArguments\.update, which cannot"),
        ({}, r"got dict\.update, which cannot be called"),
    ],
    ids=["none", "two arguments", "dict"],
)
def test_an_object_without_the_interface_is_refused(cache: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fake_quant_cache(cache, static())


def test_what_an_update_returns_is_checked() -> None:
    class Silent:
        def update(self, key: Tensor, value: Tensor, layer_idx: int) -> None: ...

    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(TypeError, match=r"layers\.0: Silent\.update: expected all keys and values .* got NoneType"):
        fake_quant_cache(Silent(), static()).update(x, x, 0)
    with pytest.raises(MismatchError, match=r"layers\.2\.key\.post_rope: expected a quantizer"):
        fake_quant_cache(DynamicCache(), static()).update(x, x, 2)
    with pytest.raises(MismatchError, match=r"tokens of 16 channels"):
        FakeQuantCache(DynamicCache(), static()).update(x[..., :4], x[..., :4], 0)


@both_stages
def test_quantizers_that_need_more_than_an_update_are_refused(stage: Stage) -> None:
    make, message = (per_token, "rotated keys") if stage == "pre_rope" else (per_channel, "needs other tokens")
    with pytest.raises(MismatchError, match=message):
        fake_quant_cache(DynamicCache(), everywhere(make, stage))


# --- KVQuant: sinks by position, outliers stored sparsely


@both_stages
def test_sinks_are_exact_by_position_and_every_decoded_token_is_quantized(
    stage: Stage, tiny_llama: LlamaForCausalLM
) -> None:
    ids, mask, _ = left_padded(12, 7)
    limit = torch.full((CHANNELS,), 1.0)
    sparse = ThresholdSparse(channels=CHANNELS, inner=per_token(), lower=-limit, upper=limit)
    held = []
    for make in (lambda: Identity(channels=CHANNELS), lambda: sparse):
        with packed_cache(tiny_llama, everywhere(make, stage), policy=CachePolicy(sink_tokens=2)) as new:
            cache = new()
            for end in range(12, 16):
                now = torch.cat([mask, torch.ones(2, end - 12, dtype=torch.bool)], dim=1)
                own = ids if end == 12 else IDS[:, end : end + 1]
                positions = (now.long().cumsum(1) - 1).clamp_min(0)[:, -own.shape[1] :]
                options = {"attention_mask": now.long(), "position_ids": positions}
                with torch.no_grad():
                    tiny_llama(own, **cache_argument(tiny_llama, cache), use_cache=True, **options)
        held.append([stream.value for stream in cache.layers[0].store.sequences])
    for exact, stored, n_tokens in zip(*held, (15, 10), strict=True):
        rows = exact.read(0, n_tokens)
        assert (stored.n_exact, stored.n_encoded) == (2, n_tokens - 2)
        assert torch.equal(stored.read(0, 2), rows[:2])
        assert torch.equal(stored.read(2, n_tokens), sparse.simulate(rows[2:]))
        n_outliers = int((rows[2:].abs() > 1).sum())
        a_token = per_token().encode(rows[2:3]).nbytes + 1  # and how many outliers it has
        assert stored.encoded_bytes == (n_tokens - 2) * a_token + n_outliers * (1 + 2)
    assert n_outliers


# --- streaming prefill

CONFIG = {"chunk_size": 8, "attention_sink_size": 2}


def compressed(model: nn.Module, **options: Any) -> CompressedModel:
    return CompressedModel(LoadedModel(model, None, None), {**CONFIG, **options})


def test_averages_are_counted_from_what_is_held(tiny_llama: LlamaForCausalLM) -> None:
    model = compressed(tiny_llama, key_bits_normal=4, value_bits_normal=3, outlier_detection_enabled=False)
    generate(model, ONE, eos_token_id=None)
    stats, n_tokens, n_encoded = model.get_compression_stats(), 31, 24
    for name, bits in (("avg_key_bits", 4), ("avg_value_bits", 3)):
        expected = (n_encoded * (bits + 16 / 8) + (n_tokens - n_encoded) * 32 + 32) / n_tokens  # the running state
        assert stats[name] == pytest.approx(expected)
    assert stats["compression_ratio"] == pytest.approx(64 / (stats["avg_key_bits"] + stats["avg_value_bits"]))
    assert stats["outlier_ratio"] == 0
    generate(model, ONE, eos_token_id=None)
    assert model.get_compression_stats() == pytest.approx(stats)


def test_the_outlier_ratio_follows_the_threshold(tiny_llama: LlamaForCausalLM) -> None:
    ratios, bits = [], []
    for threshold in (1e-6, 1.0, 1e6):
        model = compressed(tiny_llama, outlier_threshold_abs=threshold)
        generate(model, ONE)
        stats = model.get_compression_stats()
        ratios.append(stats["outlier_ratio"])
        bits.append(stats["avg_key_bits"])
    assert ratios[0] == 1 > ratios[1] > ratios[2] == 0
    assert bits[0] > bits[1] > bits[2]


def test_sixteen_bits_generate_what_the_model_generates(tiny_llama: LlamaForCausalLM) -> None:
    exact = {f"{tensor}_bits_{which}": 16 for tensor in ("key", "value") for which in ("normal", "sink_outlier")}
    expected = generate(tiny_llama, IDS)
    assert torch.equal(generate(compressed(tiny_llama, **exact), IDS), expected)
    assert torch.equal(generate(compressed(tiny_llama, chunk_size=64), IDS), expected)  # all still in the window
    assert n_hooks(tiny_llama) == 0


def test_prompts_are_read_in_chunks(tiny_llama: LlamaForCausalLM) -> None:
    model, seen = compressed(tiny_llama), []
    handle = tiny_llama.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    generate(model, ONE, max_new_tokens=3, eos_token_id=None)
    handle.remove()
    assert seen == [8, 8, 4, 1, 1]


def test_the_state_is_reset(tiny_llama: LlamaForCausalLM) -> None:
    model = compressed(tiny_llama)
    generate(model, IDS)
    model.reset_compression_state()
    with pytest.raises(CacheStateError, match="expected texts since the last reset; got none"):
        model.get_compression_stats()


def test_a_compressed_model_is_loaded_by_name() -> None:
    config = {"chunk_size": 32, "ema_decay": 0.9, "outlier_threshold_relative": 2.0}
    model = CompressedModel.from_pretrained("demo", compression_config=config, device="cpu")
    inputs = model.tokenizer("One day the " * 30, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    stats = model.get_compression_stats()
    assert 4 < stats["avg_key_bits"] < 32
    assert stats["compression_ratio"] > 1
    with pytest.raises(ValueError, match="chunk_sise: unknown option; did you mean chunk_size"):
        CompressedModel.from_pretrained("demo", compression_config={"chunk_sise": 32}, device="cpu")
