"""Evaluation: every figure against a direct formula, and the orders and limits that must hold."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.sites import CHANNELS, everywhere, identity, per_channel, per_token
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.errors import NonFiniteError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.sparse import ThresholdSparse
from artifacts.sites import Site, Stage
from calib import calibrate
from simquant import CachePolicy, EvalResult, NothingQuantizedError, evaluate, perplexity, simulate
from simquant.evaluation import scoring
from simquant.evaluation.costs import Costs
from simquant.evaluation.figures import clustered_mean, clustered_rms, perplexity_of

pytestmark = pytest.mark.shapes

REQUIRED = {
    "costs",
    "fp",
    "quantized",
    "loss_nats",
    "loss_nats_stderr",
    "kl_mean",
    "kl_mean_stderr",
    "kl_p99",
    "kl_p999",
    "top1_agreement",
    "top1_flips",
    "top1_flips_stderr",
    "delta_p_mean",
    "delta_p_mean_stderr",
    "delta_p_rms",
    "delta_p_rms_stderr",
    "bits",
    "quantized_fraction",
    "protocol",
    "seconds",
}


@pytest.fixture
def windows(tiny_llama: LlamaForCausalLM) -> Tensor:
    """Text that the model itself has written: 9 windows of 24 tokens."""
    start = torch.randint(1, 64, (9, 1))
    return tiny_llama.generate(start, do_sample=True, min_new_tokens=23, max_new_tokens=23, pad_token_id=0)


@pytest.fixture
def calibrated(tiny_llama: LlamaForCausalLM) -> Artifact:
    return calibrate(tiny_llama, torch.randint(0, 64, (4, 32)), "kvquant", bits=3)


@torch.no_grad()
def reference_nll(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2).double(), windows[:, 1:], reduction="none")


# --- the figures


def test_perplexity_is_that_of_cross_entropy(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    expected = float(reference_nll(tiny_llama, windows).mean().exp())
    for batch_size in (1, 4, 9):
        assert perplexity(tiny_llama, windows, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_every_figure_against_its_formula(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    quantizers = everywhere(lambda: per_token(2))
    fp = tiny_llama(windows).logits[:, :-1].double().log_softmax(-1).detach()
    fp_nll = reference_nll(tiny_llama, windows)
    with simulate(tiny_llama, quantizers):
        nll, alone = reference_nll(tiny_llama, windows), perplexity(tiny_llama, windows)
        quantized = tiny_llama(windows).logits[:, :-1].double().log_softmax(-1).detach()
    kl = F.kl_div(quantized, fp, reduction="none", log_target=True).sum(-1)
    agrees = (fp.argmax(-1) == quantized.argmax(-1)).double()
    delta_p = (-nll).exp() - (-fp_nll).exp()

    found = evaluate(tiny_llama, windows, quantizers, batch_size=2)

    assert found.fp_perplexity == pytest.approx(float(fp_nll.mean().exp()), rel=1e-5)
    assert found.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert found.perplexity == pytest.approx(alone, rel=1e-5)
    assert found.loss_nats == pytest.approx(math.log(found.perplexity / found.fp_perplexity), abs=1e-9)
    assert found.loss_nats == pytest.approx(float((nll - fp_nll).mean()), abs=1e-5)
    means = (nll - fp_nll).mean(1).numpy()
    assert found.loss_nats_stderr == pytest.approx(means.std(ddof=1) / 3, rel=1e-3)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    for share, percentile in ((0.99, found.kl_p99), (0.999, found.kl_p999)):
        assert percentile == pytest.approx(float(np.quantile(kl.numpy(), share, method="higher")), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float(agrees.mean()))
    assert found.top1_flips == pytest.approx(1 - float(agrees.mean()))
    assert found.delta_p_mean == pytest.approx(float(delta_p.mean()), abs=1e-6)
    assert found.delta_p_rms == pytest.approx(float(delta_p.square().mean().sqrt()), rel=1e-4)
    by_window = {
        "fp_perplexity": found.fp_perplexity * fp_nll,  # d exp(mean) = exp(mean) d mean
        "perplexity": found.perplexity * nll,
        "kl_mean": kl,
        "top1_flips": agrees,
        "delta_p_mean": delta_p,
        "delta_p_rms": delta_p.square() / (2 * found.delta_p_rms),
    }
    for name, values in by_window.items():
        expected = values.mean(1).numpy().std(ddof=1) / 3
        assert getattr(found, f"{name}_stderr") == pytest.approx(expected, rel=1e-3), name
    assert (found.n_windows, found.n_targets, found.quantized_fraction) == (9, 9 * 23, 1)
    assert found.bits["key"] == found.bits["value"] == 2 + 32 / CHANNELS
    assert found.seconds > 0


def test_identity_loses_nothing(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    found = evaluate(tiny_llama, windows, everywhere(identity), batch_size=3)
    assert found.perplexity == found.fp_perplexity
    for name in ("loss_nats", "kl_mean", "top1_flips", "delta_p_mean", "delta_p_rms"):
        assert (getattr(found, name), getattr(found, f"{name}_stderr")) == (0, 0)
    assert (found.kl_p99, found.kl_p999) == (0, 0)
    assert (found.top1_agreement, found.quantized_fraction) == (1, 0)
    assert found.bits["key"] == found.bits["amortised"]["2048"]["value"] == 32  # a float32 model keeps float32


def test_clustered_mean_against_the_formula() -> None:
    differences = torch.randn(5, 7, dtype=torch.float64) + torch.randn(5, 1)
    n, windows = differences.numel(), list(differences)
    mean = sum(float(d) for window in windows for d in window) / n
    variance = 5 / 4 * sum(sum(float(d) - mean for d in window) ** 2 for window in windows) / n**2
    assert clustered_mean(differences) == pytest.approx((mean, math.sqrt(variance)))


def test_clustering_sees_that_targets_of_a_window_move_together() -> None:
    together = torch.randn(40, 1, dtype=torch.float64).expand(40, 25)
    _, stderr = clustered_mean(together)
    assert stderr == pytest.approx(float(together[:, 0].std() / math.sqrt(40)))


def test_clusters_may_differ_in_size() -> None:
    clusters = [torch.randn(n, dtype=torch.float64) for n in (1, 4, 9)]
    mean = float(torch.cat(clusters).mean())
    variance = 3 / 2 * sum(float((cluster - mean).sum()) ** 2 for cluster in clusters) / 14**2
    assert clustered_mean(clusters) == pytest.approx((mean, math.sqrt(variance)))


def test_standard_errors_are_the_spread_over_repetitions() -> None:
    """Means, root mean squares and perplexities of many drawn texts scatter as far as each text's own error says."""
    drawn = torch.randn(400, 30, 8, dtype=torch.float64) + 0.5 * torch.randn(400, 30, 1, dtype=torch.float64)
    for figure in (clustered_mean, clustered_rms, perplexity_of):
        found = torch.tensor([figure(list(text)) for text in drawn], dtype=torch.float64)
        assert float(found[:, 1].square().mean().sqrt() / found[:, 0].std()) == pytest.approx(1, abs=0.12)


def test_a_difference_of_results_is_paired_by_window(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    two, three = (evaluate(tiny_llama, windows, everywhere(lambda b=b: per_token(b))) for b in (2, 3))
    difference, stderr = two.loss_beyond(three)
    assert difference == pytest.approx(two.loss_nats - three.loss_nats)
    means = [(a - b) / 23 for a, b in zip(two.cluster_nats, three.cluster_nats, strict=True)]
    assert stderr == pytest.approx(np.std(means, ddof=1) / 3)
    assert two.loss_beyond(two) == (0, 0)
    with pytest.raises(ValueError, match=r"of the same windows; got 207 targets .* and 92 targets"):
        two.loss_beyond(evaluate(tiny_llama, windows[:4], everywhere(per_token)))
    other = evaluate(tiny_llama, torch.randint(0, 64, (9, 24)), everywhere(per_token))
    with pytest.raises(ValueError, match="expected two evaluations of the same windows"):
        two.loss_beyond(other)


def test_gptq_normalization_is_the_mean_over_windows(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    nll = reference_nll(tiny_llama, windows)
    # GPTQ: sum over windows of (mean over targets * seqlen) / (windows * seqlen)
    expected = float(((nll.mean(1) * 24).sum() / (9 * 24)).exp())
    assert perplexity(tiny_llama, windows, normalization="gptq") == pytest.approx(expected, rel=1e-5)
    found = evaluate(tiny_llama, windows, everywhere(per_token), normalization="gptq")
    assert found.fp_perplexity == pytest.approx(expected, rel=1e-5)
    assert "GPTQ" in found.protocol


@pytest.mark.parametrize("make", [per_token, per_channel])
@pytest.mark.parametrize("stage", ["pre_rope", "post_rope"])
def test_batch_sizes_agree(
    stage: Stage, make: Callable[[], Quantizer], tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    check_batch_sizes(tiny_llama, windows, everywhere(make, stage))


def test_batch_sizes_agree_for_fitted_quantizers(
    tiny_llama: LlamaForCausalLM, windows: Tensor, calibrated: Artifact
) -> None:
    check_batch_sizes(tiny_llama, windows, calibrated)


def check_batch_sizes(model: nn.Module, windows: Tensor, quantizers: Artifact | dict[Site, Quantizer]) -> None:
    one, eight = (evaluate(model, windows, quantizers, batch_size=size) for size in (1, 8))
    for name in ("fp_perplexity", "perplexity", "loss_nats", "kl_mean", "kl_p999"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name), abs=1e-3)
    assert eight.bits == one.bits


@pytest.mark.parametrize("make", [per_token, per_channel])
def test_more_bits_lose_less(make: Callable[[int], Quantizer], tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    eight, four, two = (evaluate(tiny_llama, windows, everywhere(lambda b=b: make(b))) for b in (8, 4, 2))
    assert 0 < eight.kl_mean < four.kl_mean < two.kl_mean
    assert 0 < eight.kl_p999 < four.kl_p999 < two.kl_p999
    assert eight.loss_nats < four.loss_nats < two.loss_nats
    assert 1 >= eight.top1_agreement >= four.top1_agreement >= two.top1_agreement
    assert eight.bits["key"] > four.bits["key"] > two.bits["key"]


@pytest.mark.parametrize("scored_logits", [1, 64 * 5, 64 * 9 * 7])
def test_large_vocabularies_are_scored_in_parts(
    scored_logits: int, tiny_llama: LlamaForCausalLM, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(tiny_llama, windows, everywhere(per_token), batch_size=9)
    monkeypatch.setattr(scoring, "_SCORED_LOGITS", scored_logits)
    parts = evaluate(tiny_llama, windows, everywhere(per_token), batch_size=9)
    assert replace(parts, seconds=0.0) == replace(whole, seconds=0.0)


# --- the protocol


def test_sinks_follow_the_artifact_or_the_policy(
    tiny_llama: LlamaForCausalLM, windows: Tensor, calibrated: Artifact
) -> None:
    sinks = Artifact(calibrated.quantizers, replace(calibrated.manifest, sink_tokens=6))
    found = evaluate(tiny_llama, windows, sinks)
    assert found.quantized_fraction == 18 / 24
    assert "first 6 tokens exact" in found.protocol
    found = evaluate(tiny_llama, windows, sinks, policy=CachePolicy())
    assert found.quantized_fraction == 1
    assert "no token exempt" in found.protocol


def test_static_bytes_and_amortised_bits_are_reported(
    tiny_llama: LlamaForCausalLM, windows: Tensor, calibrated: Artifact
) -> None:
    bits = evaluate(tiny_llama, windows, calibrated).bits
    assert bits["static_bytes"] == {
        tensor: sum(q.static_bytes for site, q in calibrated.items() if site.tensor == tensor)
        for tensor in ("key", "value")
    }
    assert bits["key"] == 3  # static ranges: codes alone
    for n, both in bits["amortised"].items():
        for tensor in ("key", "value"):
            spread = 8 * bits["static_bytes"][tensor] / (int(n) * 2 * CHANNELS)
            assert both[tensor] == pytest.approx(bits[tensor] + spread)


def test_bits_are_counted_over_all_windows(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    inner = DynamicAffine(channels=CHANNELS, bits=4)
    ends = torch.full((CHANNELS,), 1.5)  # how many values lie outside differs from window to window
    quantizers = everywhere(lambda: ThresholdSparse(channels=CHANNELS, inner=inner, lower=-ends, upper=ends))
    with simulate(tiny_llama, quantizers) as usage, torch.no_grad():
        tiny_llama(windows)
    found = evaluate(tiny_llama, windows, quantizers, batch_size=2)
    for tensor in ("key", "value"):
        assert found.bits[tensor] == pytest.approx(usage.bits(tensor))
        assert found.bits[tensor] > 4 + 32 / CHANNELS


def test_scales_over_a_whole_window_are_labelled(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    mixed = everywhere(per_token) | {Site(0, "value"): per_channel()}
    assert "NOT CAUSAL" in evaluate(tiny_llama, windows, mixed).protocol
    assert "NOT CAUSAL" not in evaluate(tiny_llama, windows, everywhere(per_token)).protocol


def test_the_protocol_is_one_line_and_names_the_stage(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    protocol = evaluate(tiny_llama, windows, everywhere(per_token, "post_rope")).protocol
    assert "\n" not in protocol
    assert "post-RoPE" in protocol
    assert "9 windows of 24 tokens" in protocol


@pytest.mark.parametrize("sink_tokens", [24, 100])
def test_a_comparison_without_quantization_is_refused(
    sink_tokens: int, tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    policy = CachePolicy(sink_tokens=sink_tokens)
    with pytest.raises(NothingQuantizedError, match=rf"first {sink_tokens} tokens exact, windows of 24 tokens"):
        evaluate(tiny_llama, windows, everywhere(per_token), policy=policy)
    sixteen_bits = evaluate(tiny_llama, windows, everywhere(identity), policy=policy)
    assert sixteen_bits.quantized_fraction == 0, "nothing is meant to be quantized"


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (3, 0)])
def test_windows_without_targets_are_refused(shape: tuple[int, int], tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.zeros(shape, dtype=torch.int64)
    for run in (lambda: perplexity(tiny_llama, windows), lambda: evaluate(tiny_llama, windows, everywhere(identity))):
        with pytest.raises(ValueError, match=rf"at least one window .* got shape \({shape[0]}, {shape[1]}\)"):
            run()


def test_the_model_keeps_its_mode_and_every_batch_is_seen(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    tiny_llama.train()
    sizes: list[int] = []
    evaluate(
        tiny_llama,
        windows,
        everywhere(per_token),
        batch_size=4,
        progress=lambda batches: (sizes.append(len(b)) or b for b in batches),
    )
    assert tiny_llama.training
    assert sizes == [4, 4, 1]


# --- the result as JSON and as a table


def result(**changes: float) -> EvalResult:
    figures = {"fp_perplexity": 5.0, "perplexity": 6.0, "loss_nats": 0.2, "loss_nats_stderr": 0.1, "kl_mean": 0.1}
    bits = {"key": 4.0, "value": 4.0, "static_bytes": {"key": 1, "value": 1}, "amortised": {"2048": {"key": 4.0}}}
    bits["amortised"]["2048"]["value"] = 4.1
    rest = dict.fromkeys(REQUIRED - {"fp", "quantized", "bits", "costs", "protocol", *figures}, 0.5)
    rest |= {"fp_perplexity_stderr": 0.1, "perplexity_stderr": 0.1}
    costs = Costs(bits_per_token=64.0, static_share=0.02, decode_multiply_adds=300, model_multiply_adds=1000)
    return EvalResult(
        **{**rest, **figures, **changes}, bits=bits, costs=costs, protocol="one line", n_targets=10, n_windows=2
    )


def test_json_has_every_required_key(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    found = evaluate(tiny_llama, windows, everywhere(per_token)).to_json()
    assert set(found) >= REQUIRED
    assert found["fp"].keys() == found["quantized"].keys() == {"perplexity", "perplexity_stderr"}
    assert set(found["bits"]) == {"key", "value", "average", "static_bytes", "amortised"}
    assert set(found["bits"]["amortised"]) == {"2048", "32768", "131072"}
    linear = sum(m.weight.numel() for m in tiny_llama.modules() if isinstance(m, torch.nn.Linear))
    assert found["costs"]["model_multiply_adds"] == linear
    assert "non_finite" not in found
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_model_that_guesses_worse_than_evenly_is_not_passed_over(tiny_llama: LlamaForCausalLM) -> None:
    """Regression: a perplexity of 9995 in a vocabulary of 512 was printed like any other."""
    random = torch.randint(0, 64, (3, 24))
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(0)
        assert evaluate(tiny_llama, random, everywhere(per_token)).warnings == ()
        tiny_llama.lm_head.weight.add_(torch.randn(64, 32))
    found = evaluate(tiny_llama, random, everywhere(per_token))
    assert found.fp_perplexity > 64
    [warning] = found.to_json()["warnings"]
    assert "guessing evenly among 64 tokens" in warning
    assert f"warning: {warning}" in found.table()


def test_one_window_has_no_standard_error(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    found = evaluate(tiny_llama, windows[:1], everywhere(per_token))
    assert math.isnan(found.loss_nats_stderr)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["loss_nats_stderr"] is plain["fp"]["perplexity_stderr"] is None
    assert "non_finite" not in plain  # nothing is wrong with it
    assert "standard error n/a (one window)" in found.table()
    assert "nan" not in found.table()


def test_a_gain_over_full_precision_is_shown_with_its_error() -> None:
    table = result(perplexity=4.9, loss_nats=-0.02, loss_nats_stderr=0.03).table()
    assert "4.9000 ± 0.1000" in table
    assert "-0.02000 nats per token, standard error 0.03000" in table


def test_costs_are_told_in_one_line() -> None:
    table = result().table()
    assert (
        "cost of a token: 64 bits stored, static bytes 2.00% of the weights, 300 multiply-adds to decode, 30.00%"
        in table
    )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_json_is_valid_whatever_was_found(value: float) -> None:
    found = result(perplexity=value, loss_nats=value, kl_p999=value)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["quantized"]["perplexity"] is plain["loss_nats"] is plain["kl_p999"] is None
    assert plain["non_finite"] == dict.fromkeys(("quantized.perplexity", "loss_nats", "kl_p999"), str(value))
    assert str(value) in found.table()


def change_logits(model: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """From now on the model's logits are what `change` makes of the token ids and of them."""

    def hook(module: nn.Module, args: object, kwargs: dict[str, Tensor], output: SimpleNamespace) -> SimpleNamespace:
        output.logits = change(kwargs["input_ids"], output.logits)
        return output

    model.register_forward_hook(hook, with_kwargs=True)


def spoil_pass(model: nn.Module, number: int, bad: float) -> None:
    """The pass of this number over windows, from 0, gives `bad` to its targets."""
    passes: list[Tensor] = []

    def spoil(ids: Tensor, logits: Tensor) -> Tensor:
        passes.extend([ids] if ids.shape[1] == 24 else [])  # probing runs the model too, on other lengths
        return logits.scatter(2, ids[:, 1:, None], bad) if len(passes) == number + 1 else logits

    change_logits(model, spoil)


def test_an_infinite_loss_is_reported_not_raised(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    spoil_pass(tiny_llama, 1, -math.inf)
    found = evaluate(tiny_llama, windows, everywhere(per_token))
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["quantized"]["perplexity"] is plain["loss_nats"] is plain["kl_mean"] is plain["kl_p999"] is None
    assert plain["fp"]["perplexity"] == found.fp_perplexity
    assert plain["non_finite"]["loss_nats"] == "inf"
    assert "standard error n/a" in found.table()
    assert "one window" not in found.table()


@pytest.mark.parametrize(("number", "which"), [(2, "full-precision"), (3, "quantized")])
def test_nan_is_told_by_window_and_model(
    number: int, which: str, tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    """It was printed as `nan +- nan`, with exit code 0. Each window is read twice."""
    spoil_pass(tiny_llama, number, math.nan)
    with pytest.raises(NonFiniteError, match=rf"window 1: the {which} model gives NaN for 23 of 23 scored targets"):
        evaluate(tiny_llama, windows, everywhere(per_token))


def test_perplexity_of_nan_is_no_number(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    spoil_pass(tiny_llama, 1, math.nan)
    with pytest.raises(NonFiniteError, match="window 1: the model gives NaN"):
        perplexity(tiny_llama, windows)


def test_tokens_that_the_model_rules_out_diverge_by_nothing(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    before = evaluate(tiny_llama, windows, everywhere(per_token))
    change_logits(tiny_llama, lambda _, logits: F.pad(logits, (0, 1), value=-math.inf))  # as some models pad theirs
    assert evaluate(tiny_llama, windows, everywhere(per_token)).kl_mean == pytest.approx(before.kl_mean)
