"""Squared gradients during calibration: against finite differences and naive loops, and leaving nothing behind."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import random_llama
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import calib.capture
from artifacts.artifact import Artifact
from artifacts.errors import MismatchError, NonFiniteError, UnsupportedModelError
from artifacts.model.attention import attention_layers, hooked
from artifacts.model.layout import to_rows
from artifacts.sites import Site, Stage
from calib import calibrate
from calib.calibration import add_windows, new_statistics
from calib.capture import Vectors, capture, capture_with_gradients, collect
from calib.fitting.fit import fit
from calib.recipe.recipe import Recipe
from calib.statistics.channel_histogram import ChannelHistogram
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_statistics import FISHER, SAMPLE_TOKENS, SiteStatistics
from calib.statistics.token_histogram import OUTLIER_FRACTIONS, TokenHistogram, token_histogram
from kvgauge.cli.calibrate import main

KEY, VALUE = Site(1, "key", "pre_rope"), Site(1, "value")
both_stages = pytest.mark.parametrize("stage", ["pre_rope", "post_rope"])


def cached(stage: Stage = "pre_rope") -> list[Site]:
    return [site for layer in (0, 1) for site in (Site(layer, "key", stage), Site(layer, "value"))]


def windows_of(n: int = 4, n_tokens: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (n, n_tokens), generator=torch.Generator().manual_seed(seed))


def gathered(model: LlamaForCausalLM, windows: Tensor, **options: Any) -> ModelStatistics:
    layers = attention_layers(model)
    statistics = new_statistics(model, layers, **{"fisher": True, **options})
    add_windows(model, layers, statistics, windows)
    return statistics


def all_of(model: LlamaForCausalLM, windows: Tensor, start: int) -> tuple[Vectors, Vectors]:
    """Vectors and gradients of every cached site from position `start` on."""
    layers = attention_layers(model)
    parts = [capture_with_gradients(model, layers, cached(), window[None]) for window in windows]
    vectors, gradients = ({site: torch.cat([p[i][site][start:] for p in parts]) for site in cached()} for i in (0, 1))
    return vectors, gradients


def weighted_tokens(n: int = 400, channels: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Channels of different scales, and weights over many orders of magnitude, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, generator=generator) * torch.logspace(-3, 3, channels)
    weights = torch.randn(n, channels, generator=generator).double().mul(3).exp()
    weights[::7] = 0.0
    return x, weights


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    """Of the largest entry: sums of either sign may cancel."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def assert_same_fisher(found: ModelStatistics, expected: ModelStatistics) -> None:
    for site in cached():
        own, other = found.sites[site], expected.sites[site]
        for name in FISHER:
            for key, tensor in other.statistics[name].state().items():
                assert_close(own.statistics[name].state()[key].double(), tensor.double())
        for name in ("rows", "first_rows", "row_gradients", "first_gradients"):
            assert torch.equal(own.samples[name], other.samples[name]), name


# Gradients


@both_stages
def test_gradients_are_finite_differences_of_the_summed_loss(
    tiny_llama: LlamaForCausalLM, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wide_norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:  # its own computes in float32
        return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)
    layers, model, ids = attention_layers(tiny_llama), tiny_llama.double(), windows_of(2, n_tokens=12)
    _, gradients = capture_with_gradients(model, layers, cached(stage), ids)

    def loss(site: Site, entry: int, step: float) -> float:
        def nudged(x: Tensor) -> Tensor:
            moved = x.transpose(1, 2).contiguous()  # tokens as rows, heads side by side
            moved.view(-1)[entry] += step
            return moved.transpose(1, 2)

        with torch.no_grad(), hooked(layers, {site: nudged}):
            likelihoods = model(input_ids=ids).logits.log_softmax(-1)
        return -float(likelihoods[:, :-1].gather(2, ids[:, 1:, None]).sum())

    for site, gradient in gradients.items():
        for entry in (0, 12 * 16 + 37, int(gradient.abs().argmax())):
            slope = (loss(site, entry, 1e-5) - loss(site, entry, -1e-5)) / 2e-5
            assert float(gradient.view(-1)[entry]) == pytest.approx(slope, rel=1e-5, abs=1e-8), site
    assert gradients.keys() == set(cached(stage))


@pytest.mark.parametrize(("kind", "options"), [("qwen3", {"head_dim": 8}), ("phi3", {})])
def test_norms_and_fused_projections_have_the_gradients_of_a_bare_backward_pass(
    kind: str, options: dict[str, int]
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"num_hidden_layers": 2, "vocab_size": 64, "initializer_range": 0.2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape, **rest, **options)).eval()
    layers, ids, outputs = attention_layers(model), windows_of(2, n_tokens=12), {}
    _, gradients = capture_with_gradients(model, layers, cached(), ids)
    for layer in layers:
        for hook in (layer.key, layer.value):
            hook.module.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
    output = model(input_ids=ids, use_cache=False)
    for tensor in outputs.values():
        tensor.retain_grad()
    nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for layer in layers:
        for hook, site in (
            (layer.key, Site(layer.layer, "key", "pre_rope")),
            (layer.value, Site(layer.layer, "value")),
        ):
            assert_close(gradients[site], to_rows(hook.read(outputs[hook.module].grad)), rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # in eager, padding on the left reads what comes after it
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_window_has_the_gradients_that_it_has_alone(
    tiny_llama: LlamaForCausalLM, side: str, attention: str
) -> None:
    tiny_llama.set_attn_implementation(attention)
    windows, layers = [windows_of(1, n, seed=n)[0] for n in (5, 17, 12)], attention_layers(tiny_llama)
    ids, mask = torch.full((3, 17), 63), torch.zeros(3, 17, dtype=torch.bool)
    for row, window in enumerate(windows):
        place = slice(17 - len(window), 17) if side == "left" else slice(len(window))
        ids[row, place], mask[row, place] = window, True
    _, padded = capture_with_gradients(tiny_llama, layers, cached(), ids, mask)
    alone = [capture_with_gradients(tiny_llama, layers, cached(), window[None])[1] for window in windows]
    for site, found in padded.items():
        assert_close(found, torch.cat([part[site] for part in alone]), rtol=1e-4)


@both_stages
def test_vectors_are_those_without_gradients(tiny_llama: LlamaForCausalLM, stage: Stage) -> None:
    layers, ids = attention_layers(tiny_llama), windows_of(2)
    sites = [*cached(stage), Site(0, "query", stage), Site(1, "query", stage)]
    vectors, gradients = capture_with_gradients(tiny_llama, layers, sites, ids)
    expected = capture(tiny_llama, layers, sites, ids)
    assert vectors.keys() == expected.keys()
    assert gradients.keys() == set(cached(stage))
    for site, x in vectors.items():
        assert torch.equal(x, expected[site])
        assert not x.requires_grad


def test_a_window_of_one_token_has_no_loss(tiny_llama: LlamaForCausalLM) -> None:
    _, gradients = capture_with_gradients(tiny_llama, attention_layers(tiny_llama), cached(), windows_of(1, 1))
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_model_without_logits_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    decoder = tiny_llama.model
    with pytest.raises(UnsupportedModelError, match="need the logits of a causal language model; got BaseModelOutput"):
        capture_with_gradients(decoder, attention_layers(decoder), cached(), windows_of(1))


# The model afterwards


@pytest.mark.parametrize("place", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_a_module_without_gradients_is_named(place: str) -> None:
    """Torch's own words were let through, or, where a residual goes by, the gradients of another model."""

    class Opaque(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    model = random_llama()
    linear = model.get_submodule(place)
    linear.__class__ = Opaque
    layers = attention_layers(model)
    sites = [Site(i, "key", "pre_rope") for i in (0, 1)] + [Site(i, "value") for i in (0, 1)]
    with pytest.raises(UnsupportedModelError, match=rf"^{place}: squared gradients need .*; Opaque gives its input no"):
        capture_with_gradients(model, layers, sites, torch.arange(8)[None])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_without_a_way_back_is_refused(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calib.capture, "_summed_loss", lambda output, *_: output.logits.detach().sum())
    layers = attention_layers(tiny_llama)
    with pytest.raises(UnsupportedModelError, match=r"^layers\.0\.key\.pre_rope: squared gradients need a loss"):
        capture_with_gradients(tiny_llama, layers, [Site(0, "key", "pre_rope")], torch.arange(8)[None])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(tiny_llama: LlamaForCausalLM, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    tiny_llama.train()
    tiny_llama.lm_head.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in tiny_llama.named_parameters()}
    layers = attention_layers(tiny_llama)
    statistics = new_statistics(tiny_llama, layers, fisher=True)
    if fails:
        monkeypatch.setattr(torch.autograd, "grad", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            add_windows(tiny_llama, layers, statistics, windows_of(1))
    else:
        add_windows(tiny_llama, layers, statistics, windows_of(1))
    assert statistics.n_tokens == (0 if fails else 24)
    assert tiny_llama.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.modules())
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_no_gradient_outlives_its_window(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    grad, capturing, alive = torch.autograd.grad, capture_with_gradients, []

    def watched_grad(loss: Tensor, sources: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        found = grad(loss, sources, **options)
        seen.extend(map(weakref.ref, [loss, *sources, *found]))
        return found

    def watched(*arguments: Any) -> tuple[Vectors, Vectors]:
        alive.append(sum(tensor() is not None for tensor in seen))
        captured = capturing(*arguments)
        seen.extend(weakref.ref(tensor) for part in captured for tensor in part.values())
        return captured

    monkeypatch.setattr(torch.autograd, "grad", watched_grad)
    monkeypatch.setattr(calib.capture, "capture_with_gradients", watched)
    gc.disable()  # freed at once, not when a cycle happens to be collected
    try:
        gathered(tiny_llama, windows_of(3))
        assert alive == [0, 0, 0]
        assert len(seen) == 3 * (1 + 4 + 4 + 6 + 4)
    finally:
        gc.enable()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_are_refused(
    tiny_llama: LlamaForCausalLM, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(loss: Tensor, sources: list[Tensor], **_: Any) -> list[Tensor]:
        gradients = [torch.zeros_like(source) for source in sources]
        gradients[3][1, 0, 5, 2:4] = bad
        return gradients

    layers = attention_layers(tiny_llama)
    statistics, before = gathered(tiny_llama, windows_of(3)), gathered(tiny_llama, windows_of(3))
    monkeypatch.setattr(torch.autograd, "grad", spoilt)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.value: 2 of 768 gradients are NaN .* first in window 4\."):
        collect(tiny_llama, layers, statistics, [(windows_of(2, seed=5), None)])
    assert_same_fisher(statistics, before)
    assert len(statistics.windows) == 3


# Weighted histograms


def test_weighted_bins_are_a_naive_loop() -> None:
    x, weights = weighted_tokens()
    counted, weighted = ChannelHistogram(16, 64), ChannelHistogram(16, 64, torch.float64)
    for part, w in zip(x.split(37), weights.split(37), strict=True):
        counted.update(part)
        weighted.update(part, w)
    for name in ("minimum", "maximum", "exponent", "first"):
        assert torch.equal(counted.state()[name], weighted.state()[name])
    expected = torch.zeros(16, 64, dtype=torch.float64)
    for channel in range(16):
        width, first = float(counted.width()[channel]), int(counted.first[channel])
        for value, weight in zip(x[:, channel].tolist(), weights[:, channel].tolist(), strict=True):
            expected[channel, int(np.floor(value / width)) - first] += weight
    torch.testing.assert_close(weighted.counts, expected, rtol=1e-12, atol=0)
    assert not weighted.counts[counted.counts == 0].any()
    channel, _, sums = weighted.occupied()
    torch.testing.assert_close(torch.bincount(channel, sums), weights.sum(0))


def naive_token_bins(x: Tensor, weights: Tensor, fraction: float, bins: int) -> tuple[np.ndarray, np.ndarray]:
    sums, spread = np.zeros(bins), np.zeros(bins)
    for row, own in zip(x.double().numpy(), weights.numpy(), strict=True):
        low, high = np.percentile(row, [50 * fraction, 100 - 50 * fraction])
        kept = (row > low) & (row < high) if fraction else np.full(len(row), True)
        least, half = row[kept].min(), np.ptp(row[kept]) / 2
        index = np.clip((row[kept] - least) / half * bins / 2, 0, bins - 1).astype(int)
        np.add.at(sums, index, own[kept])
        np.add.at(spread, index, own[kept] * half**2)
    return sums, spread


def test_weighted_token_bins_are_a_naive_loop() -> None:
    x, weights = torch.randn(60, 200), torch.rand(60, 200).double() + 0.5
    weighted = TokenHistogram(200, 64, torch.float64)
    weighted.update(x, weights)
    for row, fraction in enumerate(OUTLIER_FRACTIONS):
        sums, spread = naive_token_bins(x, weights, fraction, 64)
        for found, expected, heaviest in (
            (weighted.counts[row].numpy(), sums, 1.5),
            (weighted.weights[row].numpy(), spread, 1.5 * float(x.abs().max()) ** 2),
        ):
            moved = np.abs(np.cumsum(found - expected)).max()  # values that rounding puts next door
            assert moved <= 2 * heaviest
            np.testing.assert_allclose(found.sum(), expected.sum(), rtol=1e-6)
        again = token_histogram(x, fraction, 64, weights)
        torch.testing.assert_close(again, (weighted.counts[row], weighted.weights[row]))


@pytest.mark.parametrize("make", [lambda d: ChannelHistogram(16, 64, d), lambda d: TokenHistogram(16, 64, d)])
def test_a_weight_is_so_many_values(make: Callable[[torch.dtype], Any]) -> None:
    x, _ = weighted_tokens()
    counted, ones, twice = make(torch.int64), make(torch.float64), make(torch.float64)
    counted.update(torch.cat([x, x[:100]]))
    ones.update(torch.cat([x, x[:100]]), torch.ones(500, 16).double())
    twice.update(x, (torch.arange(400) < 100).double().add(1)[:, None].expand(400, 16))
    for name in ("counts", "weights"):
        if name in counted.STATE:
            assert_close(ones.state()[name], counted.state()[name].double(), rtol=1e-12)
            assert_close(twice.state()[name], counted.state()[name].double(), rtol=1e-12)


@pytest.mark.parametrize("make", [ChannelHistogram, TokenHistogram])
def test_weights_cannot_be_counted(make: Callable[[int], Any]) -> None:
    x, weights = weighted_tokens()
    with pytest.raises(RuntimeError, match="can't be cast"):
        make(16).update(x, weights)


# Statistics


@pytest.mark.shapes
@pytest.mark.parametrize("sink_tokens", [0, 3, 8])
def test_statistics_are_those_of_the_gradients(tiny_llama: LlamaForCausalLM, sink_tokens: int) -> None:
    windows = windows_of(3)
    statistics = gathered(tiny_llama, windows)
    vectors, gradients = all_of(tiny_llama, windows, sink_tokens)
    for site in cached():
        chosen, x, g = statistics.site(site, sink_tokens), vectors[site], gradients[site].double()
        heads = g.unflatten(1, (2, 8))
        second = torch.einsum("thi,thj->hij", heads, heads) / len(g)
        assert_close(chosen.gradient_moments.second(), second)
        expected = SiteStatistics(chosen.shape, "basic", fisher=True)
        expected.update(x, g.float())
        for name in FISHER:
            for key, tensor in expected.statistics[name].state().items():
                assert_close(getattr(chosen, name).state()[key].double(), tensor.double())
        assert torch.equal(chosen.fisher_histogram.first, chosen.histogram.first)
        assert torch.equal(chosen.fisher_histogram.exponent, chosen.histogram.exponent)
        assert not chosen.fisher_histogram.counts[chosen.histogram.counts == 0].any()
        assert not chosen.fisher_token_histogram.counts[chosen.token_histogram.counts == 0].any()
        assert_close(chosen.fisher_histogram.counts.sum(1), g.square().sum(0))
        pairs = torch.cat([chosen.rows, chosen.row_gradients], 1)
        assert {tuple(row) for row in pairs.tolist()} == {tuple(row) for row in torch.cat([x, g.float()], 1).tolist()}


@pytest.mark.parametrize("tier", ["basic", "full"])
def test_the_rest_is_what_it_is_without_gradients(tiny_llama: LlamaForCausalLM, tier: str, tmp_path: Path) -> None:
    fisher, plain = (gathered(tiny_llama, windows_of(), tier=tier, fisher=flag) for flag in (True, False))
    for site, own in plain.sites.items():
        state = own.state()
        assert not any("fisher" in name or "gradient" in name for name in state)
        for name, tensor in state.items():
            assert torch.equal(tensor, fisher.sites[site].state()[name]), (site, name)
    assert not any(statistics.fisher for site, statistics in fisher.sites.items() if site.tensor == "query")
    plain.save(tmp_path / "plain.safetensors")
    assert b"fisher" not in (tmp_path / "plain.safetensors").read_bytes()


def test_shards_and_order_of_windows_do_not_matter(tiny_llama: LlamaForCausalLM) -> None:
    windows = windows_of()
    whole, merged = gathered(tiny_llama, windows), gathered(tiny_llama, windows[3:])
    merged.merge(gathered(tiny_llama, windows[:3]))
    assert_same_fisher(merged, whole)
    assert_same_fisher(gathered(tiny_llama, windows.flip(0)), whole)


def test_the_reservoir_overflows_alike_in_any_order(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLE_TOKENS, "basic", 30)
    windows = windows_of()
    whole, merged = gathered(tiny_llama, windows), gathered(tiny_llama, windows[1::2])
    merged.merge(gathered(tiny_llama, windows[::2]))
    assert_same_fisher(merged, whole)
    assert len(whole.sites[KEY].row_gradients) == 30


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_save_load_save_gives_the_same_bytes(tiny_llama: LlamaForCausalLM, tmp_path: Path, suffix: str) -> None:
    statistics = gathered(tiny_llama, windows_of())
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    statistics.save(first)
    loaded = ModelStatistics.load(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert loaded.fisher
    assert_same_fisher(loaded, statistics)
    loaded.merge(gathered(tiny_llama, windows_of(seed=1)))
    whole = gathered(tiny_llama, torch.cat([windows_of(), windows_of(seed=1)]))
    assert_same_fisher(loaded, whole)


@pytest.mark.parametrize("fisher", [False, True])
def test_shards_with_and_without_gradients_do_not_merge(tiny_llama: LlamaForCausalLM, fisher: bool) -> None:
    statistics = gathered(tiny_llama, windows_of(2), fisher=fisher)
    with pytest.raises(MismatchError, match=f"differ in fisher: {fisher} and {not fisher}.* every shard with --fisher"):
        statistics.merge(gathered(tiny_llama, windows_of(2, seed=1), fisher=not fisher))
    assert len(statistics.windows) == 2


def test_what_needs_gradients_says_so(tiny_llama: LlamaForCausalLM) -> None:
    plain = gathered(tiny_llama, windows_of(2), fisher=False).site(KEY, 0)
    for name in (*FISHER, "row_gradients"):
        with pytest.raises(ValueError, match=r"layers\.1\.key\.pre_rope: the recipe needs squared.* with --fisher\."):
            getattr(plain, name)


@pytest.mark.parametrize("fisher", [False, True])
def test_gradients_missing_or_left_over_are_refused(tiny_llama: LlamaForCausalLM, fisher: bool) -> None:
    layers, ids = attention_layers(tiny_llama), windows_of(1)
    statistics = new_statistics(tiny_llama, layers, fisher=fisher)
    vectors, gradients = capture_with_gradients(tiny_llama, layers, statistics.sites, ids)
    given = {VALUE: gradients[VALUE]}
    with pytest.raises(ValueError, match=r"expected gradients of exactly .* got others: \['layers"):
        statistics.update(calib.capture.token_batch(ids, None, 0), vectors, given)
    assert statistics.n_tokens == 0


@pytest.mark.parametrize("tier", ["basic", "full"])
def test_memory_is_bounded_by_the_estimate(
    tiny_llama: LlamaForCausalLM, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLE_TOKENS, tier, 50)
    layers = attention_layers(tiny_llama)
    statistics = new_statistics(tiny_llama, layers, tier=tier, fisher=True)
    estimate = statistics.estimated_bytes()
    assert estimate > new_statistics(tiny_llama, layers, tier=tier).estimated_bytes()
    add_windows(tiny_llama, layers, statistics, windows_of(8))
    held = sum(tensor.nbytes for own in statistics.sites.values() for tensor in own.state().values())
    held += sum(moments.products.nbytes for moments in statistics.cross.values())
    assert held == estimate == statistics.estimated_bytes()


def test_calibrate_takes_gradients_where_they_are_asked_for(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ModelStatistics] = []

    def noted(statistics: ModelStatistics, recipe: Recipe) -> Artifact:
        asked.append(statistics)
        return fit(statistics, recipe)

    monkeypatch.setattr("calib.calibration.fit", noted)
    calibrate(tiny_llama, windows_of(2), fisher=True)
    calibrate(tiny_llama, windows_of(2))
    assert [statistics.fisher for statistics in asked] == [True, False]
    assert asked[0].sites[KEY].fisher_histogram.counts.any()


# The program


def test_the_program_gathers_gradients_and_merges_only_alike(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("model")
    np.save("text.npy", windows_of(1, 500)[0].numpy())
    gather = "model --dataset text.npy --nsamples 3 --seqlen 32 --save-statistics"
    fit = "--recipe kvquant --abits 3 --quantizer-path"
    for shard in (1, 2):
        assert main(f"{gather} {shard}.safetensors --shard {shard}/2 --fisher".split()) == 0
    assert main(f"{gather} whole.safetensors --fisher {fit} whole-q.safetensors".split()) == 0
    assert main(f"--merge 1.safetensors 2.safetensors {fit} merged-q.safetensors".split()) == 0
    assert main(f"{gather} plain.safetensors {fit} plain-q.safetensors".split()) == 0
    first, second, whole = (ModelStatistics.load(f"{name}.safetensors") for name in ("1", "2", "whole"))
    first.merge(second)
    assert_same_fisher(first, whole)
    assert Path("merged-q.safetensors").read_bytes() == Path("whole-q.safetensors").read_bytes()
    for line, message in (
        (f"--from-statistics whole.safetensors --fisher {fit} q.safetensors", "--fisher has no effect with"),
        (f"--merge 1.safetensors 2.safetensors --fisher {fit} q.safetensors", "--fisher has no effect with"),
        (f"--merge 1.safetensors plain.safetensors {fit} q.safetensors", "differ in fisher: True and False"),
        (f"{gather} more.safetensors --resume plain.safetensors --fisher", "differ in fisher: True and False"),
        (f"{gather} more.safetensors --resume whole.safetensors", "differ in fisher: False and True"),
    ):
        capsys.readouterr()
        assert main(line.split()) != 0
        assert message in capsys.readouterr().err
    assert not Path("q.safetensors").exists()
