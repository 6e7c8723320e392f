"""Sinks that quantizers keep exact, in a model: simulated, packed, cropped, saved, counted."""

from pathlib import Path

import pytest
import torch
from helpers.caches import step
from helpers.models import both_stages, logits
from helpers.protocols import IDS, STEPS, both_ways, streams, through_the_cache
from helpers.quantizers import QUANTIZERS
from helpers.sites import CHANNELS, everywhere, per_token
from torch import Tensor
from transformers import LlamaForCausalLM

import artifacts
from artifacts.artifact import Artifact
from artifacts.model.attention import attention_layers
from artifacts.quantizer import Quantizer
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.sites import Site, Stage
from calib.calibration import add_windows, new_statistics
from calib.fitting.fit import fit
from calib.fitting.sinks import choose_sinks
from calib.recipe.recipe import Recipe, load_recipe
from calib.statistics.model_statistics import ModelStatistics
from simquant import CachePolicy, evaluate, load_cache, packed_cache, save_cache, simulate

POLICIES = {
    "token by token": CachePolicy(sink_tokens=1, residual_tokens=5),
    "blocks": CachePolicy(sink_tokens=1, residual_tokens=3, block_tokens=4),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@torch.no_grad()
def value_norms(model: LlamaForCausalLM, layer: int) -> Tensor:
    seen: list[Tensor] = []
    projection = model.model.layers[layer].self_attn.v_proj
    hook = projection.register_forward_hook(lambda *args: seen.append(args[2].flatten(0, 1).norm(dim=1)))
    logits(model, IDS)
    hook.remove()
    return torch.cat(seen)


@pytest.fixture
def quantizers(tiny_llama: LlamaForCausalLM) -> dict[Site, Quantizer]:
    """Values of which a third is kept in each layer."""
    found = everywhere(per_token)
    for layer in range(2):
        limit = torch.quantile(value_norms(tiny_llama, layer), 1 / 3)[None]
        site = Site(layer, "value")
        found[site] = ExactSinks(channels=CHANNELS, inner=found[site], least_norm=limit).at(site)
    return found


@every_policy
@pytest.mark.parametrize("steps", ["decoding", "chunks", "prefill"])
def test_one_pass_keeps_what_a_cache_keeps(
    steps: str, policy: CachePolicy, quantizers: dict[Site, Quantizer], tiny_llama: LlamaForCausalLM
) -> None:
    stepwise, once = both_ways(tiny_llama, quantizers, policy, STEPS[steps])
    torch.testing.assert_close(once.log_softmax(-1), stepwise.log_softmax(-1), rtol=0, atol=1e-6)


@both_stages
@pytest.mark.parametrize("name", ["exact-sinks-codebook", "exact-sinks-groups", "exact-sinks-entropy-coded"])
def test_every_inner_quantizer_is_packed_as_it_is_simulated(
    name: str, stage: Stage, tiny_llama: LlamaForCausalLM
) -> None:
    """With half of the values kept, and keys by the same limit."""
    limits = [value_norms(tiny_llama, layer).median()[None] for layer in range(2)]
    own = everywhere(lambda: QUANTIZERS[name](CHANNELS, 3), stage)
    own = {site: quantizer.replace(least_norm=limits[site.layer]) for site, quantizer in own.items()}
    stepwise, once = both_ways(tiny_llama, own, POLICIES["blocks"], STEPS["prefill"])
    torch.testing.assert_close(once.log_softmax(-1), stepwise.log_softmax(-1), rtol=0, atol=1e-6)


def test_a_token_decides_for_itself_in_any_chunks(
    quantizers: dict[Site, Quantizer], tiny_llama: LlamaForCausalLM
) -> None:
    policy = CachePolicy(sink_tokens=1)
    for steps in ("whole", "chunks"):
        _, codes = through_the_cache(tiny_llama.double(), quantizers, policy, STEPS[steps])
        kept = {where: part.tensors["counts"] for where, part in codes.items() if where[0].tensor == "value"}
        expected = {where: kept[where] for where in kept if where[0].layer == 0}
        if steps == "whole":
            first = expected
    assert all(torch.equal(first[where], flags) for where, flags in expected.items())
    assert 0 < sum(int(flags.sum()) for flags in first.values()) < 2 * 39


@every_policy
def test_cropped_and_saved_caches_go_on(
    policy: CachePolicy, quantizers: dict[Site, Quantizer], tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    with packed_cache(tiny_llama, quantizers, policy=policy) as new:
        cache = new()
        step(tiny_llama, cache, IDS[:, :20])
        save_cache(cache, tmp_path / "c.safetensors")
        again = load_cache(tmp_path / "c.safetensors", new())
        first = step(tiny_llama, cache, IDS[:, 20:23])
        cache.crop(-3)
        assert torch.equal(step(tiny_llama, again, IDS[:, 20:23]), first)
        torch.testing.assert_close(step(tiny_llama, cache, IDS[:, 20:23]), first, rtol=1e-3, atol=1e-3)
        cache.crop(12)
        for _, _, stream in streams(cache):
            codes = stream.value.codes()
            assert codes is not None
            assert len(codes.tensors["values"]) == int(codes.tensors["counts"].sum())


def test_kept_tokens_are_paid_for_and_not_called_quantized(
    quantizers: dict[Site, Quantizer], tiny_llama: LlamaForCausalLM
) -> None:
    with torch.no_grad(), simulate(tiny_llama, quantizers) as usage:
        logits(tiny_llama, IDS)
    n_kept = [usage.sites[Site(layer, "value")].n_kept for layer in range(2)]
    assert n_kept[0] == 27  # the inputs of the first layer are those of which a third is below the limit
    assert usage.quantized_fraction == pytest.approx(1 - sum(n_kept) / (4 * 80))
    a_token = CHANNELS // 2 + 4
    assert usage.bits("key") == 8 * a_token / CHANNELS
    paid = 80 * 2 * (a_token + 1) + sum(n_kept) * CHANNELS * 2
    assert usage.bits("value") == pytest.approx(8 * paid / (2 * 80 * CHANNELS))
    found = [
        evaluate(tiny_llama, IDS[:1], quantizers, protocol=protocol, chunking=chunking)
        for protocol, chunking in (("full", None), ("cache", STEPS["whole"]))
    ]
    assert found[0].quantized_fraction == found[1].quantized_fraction < 1
    assert found[0].bits["average"] == found[1].bits["average"]


def test_all_kept_is_nothing_quantized(tiny_llama: LlamaForCausalLM) -> None:
    def all_kept() -> Quantizer:
        return ExactSinks(channels=CHANNELS, inner=per_token(), least_norm=torch.tensor([1e4]))

    with pytest.raises(ValueError, match="quantize"):
        evaluate(tiny_llama, IDS[:1], everywhere(all_kept))


# --- fitted


def with_small_tokens(model: LlamaForCausalLM) -> ModelStatistics:
    """Statistics in which first tokens are so small that a twentieth of all others lies below the threshold."""
    layers = attention_layers(model)
    statistics = new_statistics(model, layers, tier="full")
    add_windows(model, layers, statistics, torch.randint(3, 64, (8, 40)))
    for site, own in statistics.sites.items():
        if site.tensor == "value":
            norms = own.rows.norm(dim=1)
            rows = own.samples["first_rows"]
            first = statistics.first.positions == 0
            rows[first] *= torch.quantile(norms, 0.05) ** 2 / norms.median() / rows[first].norm(dim=1, keepdim=True)
    return statistics


def recipe_around(name: str) -> Recipe:
    recipe = load_recipe(name)
    own = recipe.value.model_dump(mode="json")
    value = own if own["method"] == "exact_sinks" else {"method": "exact_sinks", "inner": own}
    return recipe.edited({"sink_tokens": 1, "value": value})


STREAMS = {"bits": 2.0, "group_tokens": 4}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("eigen", {}),
        ("predictive", {}),
        ("predictive-entropy", {"key": STREAMS, "value": STREAMS}),
        ("kvquant-3-1pct", {}),
    ],
)
def test_a_recipe_with_exact_sinks_is_fitted_saved_and_packed(
    name: str, changes: dict[str, object], tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    artifact = fit(with_small_tokens(tiny_llama), recipe_around(name).edited(changes))
    values = [quantizer for site, quantizer in artifact.items() if site.tensor == "value"]
    assert all(isinstance(quantizer, ExactSinks) for quantizer in values)
    artifacts.save(artifact, tmp_path / "q.safetensors")
    again = artifacts.load(tmp_path / "q.safetensors")
    assert again.manifest.specs == artifact.manifest.specs
    assert "exact_sinks of" in values[0].spec.describe()
    with torch.no_grad(), simulate(tiny_llama, again, policy=CachePolicy(sink_tokens=1)) as usage:
        logits(tiny_llama, IDS)
    assert all(0 < usage.sites[Site(layer, "value")].n_kept < 20 for layer in range(2))
    policy = CachePolicy(sink_tokens=1, block_tokens=4 if changes else 1)
    stepwise, once = both_ways(tiny_llama, dict(again.items()), policy, STEPS["prefill"])
    torch.testing.assert_close(once.log_softmax(-1), stepwise.log_softmax(-1), rtol=0, atol=1e-6)


def test_the_number_of_first_tokens_is_chosen_as_without_them(tiny_llama: LlamaForCausalLM) -> None:
    """Kept by its norm, a first token would need no place of its own; without that place nothing tells its norm."""
    statistics = with_small_tokens(tiny_llama)
    wrapped = dict(fit(statistics, recipe_around("predictive")).items())
    plain = {site: own.inner if isinstance(own, ExactSinks) else own for site, own in wrapped.items()}
    assert wrapped != plain
    assert choose_sinks(statistics, wrapped) == choose_sinks(statistics, plain)
    found = fit(statistics, recipe_around("eigen").edited({"sink_tokens": "auto"}))
    kept = any(isinstance(quantizer, ExactSinks) for quantizer in found.values())
    assert kept == (found.manifest.sink_tokens > 0)


def test_a_budget_is_met_beside_the_tokens_that_are_kept(tiny_llama: LlamaForCausalLM) -> None:
    artifact: Artifact = fit(with_small_tokens(tiny_llama), recipe_around("predictive").edited({"target_bits": 1.5}))
    with torch.no_grad(), simulate(tiny_llama, artifact, policy=CachePolicy()) as usage:
        logits(tiny_llama, IDS)
    assert 1 <= usage.bits("key") <= 1.75
    n_kept = sum(use.n_kept for use in usage.sites.values())
    paid = (2 * 80 + n_kept * CHANNELS * 2) * 8 / (4 * 80 * CHANNELS)
    assert 1.0 <= usage.average_bits - paid <= 1.5
