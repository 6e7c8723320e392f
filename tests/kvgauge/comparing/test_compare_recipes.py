"""Recipes side by side: layers' errors against the model itself and loops, figures against `evaluate`, the reports."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import SUPPORTED, supported
from helpers.programs import prose, save_model, save_tokenizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.errors import MismatchError
from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site, Stage
from calib import capture
from calib.fitting.fit import fit
from kvgauge.cli import calibrate as calibrate_program
from kvgauge.cli import compare as compare_recipes
from kvgauge.cli import evaluate as evaluate_program
from kvgauge.comparing import comparison, report
from kvgauge.terminal.pareto import Point, label_points, pareto_front, plot_pareto, save_pareto
from scripts.results.kinds import KINDS, kept
from simquant import CachePolicy, evaluate, simulate
from simquant.evaluate import evaluate_each
from simquant.evaluation import evaluation_run, site_errors
from simquant.evaluation.attention_inputs import attention_inputs
from simquant.evaluation.site_errors import AttentionErrors, attention_errors

WINDOW = torch.arange(1, 25) * 7 % 64
RATIOS = ("logits", "key_output", "value_output", "output")


def pair(layer: AttentionLayer, stage: Stage, key_bits: int, value_bits: int) -> dict[Site, Quantizer]:
    sites = {Site(layer.layer, "key", stage): key_bits, Site(layer.layer, "value"): value_bits}
    return {site: quantizer(layer.channels, bits) for site, bits in sites.items()}


def quantizer(channels: int, bits: int) -> Quantizer:
    return Identity(channels=channels) if bits == 16 else DynamicAffine(channels=channels, bits=bits)


def errors_of(
    model: nn.Module, layer: AttentionLayer, quantizers: dict[Site, Quantizer], **sinks: int
) -> AttentionErrors:
    [inputs] = attention_inputs(model, [layer], WINDOW)
    return attention_errors(inputs, quantizers, **sinks)


# --- errors of layers


@torch.no_grad()
def attention_output(model: nn.Module, layer: AttentionLayer) -> Tensor:
    """What the layer hands to its output projection."""
    found: list[Tensor] = []
    names = ("o_proj", "dense", "out_proj")
    projection = next(child for name, child in layer.module.named_children() if name in names)
    hook = projection.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    model(WINDOW[None])
    hook.remove()
    return found[0]


@pytest.mark.parametrize("kind", SUPPORTED)
def test_output_errors_are_those_of_the_model_itself(kind: str) -> None:
    model, layers = supported(kind)
    for layer in layers:
        check_against_the_model(model, layers, layer, "pre_rope", "output")


@pytest.mark.parametrize("stage", ["pre_rope", "post_rope"])
@pytest.mark.parametrize("name", ["key_output", "value_output", "output"])
def test_each_error_is_that_of_what_was_quantized(name: str, stage: Stage, tiny_llama: LlamaForCausalLM) -> None:
    layers = attention_layers(tiny_llama)
    check_against_the_model(tiny_llama, layers, layers[1], stage, name)


def check_against_the_model(
    model: nn.Module, layers: Sequence[AttentionLayer], layer: AttentionLayer, stage: Stage, name: str
) -> None:
    """The model's own attention, with one layer quantized inside it, strays as far as `name` says."""
    bits = {"key_output": (2, 16), "value_output": (16, 2), "output": (2, 2)}[name]
    chosen = pair(layer, stage, *bits)
    exact = attention_output(model, layer)
    identities = {site: q for other in layers if other is not layer for site, q in pair(other, stage, 16, 16).items()}
    with simulate(model, {**chosen, **identities}, layers=layers):
        expected = float((attention_output(model, layer) - exact).double().square().sum())
    found = errors_of(model, layer, chosen)
    assert getattr(found, name) == pytest.approx(expected, rel=1e-3)
    assert found.output_energy == pytest.approx(float(exact.double().square().sum()), rel=1e-4)
    assert found.relative()[name] == pytest.approx(expected / found.output_energy, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3"])
def test_logit_errors_against_loops(kind: str) -> None:
    model, layers = supported(kind)
    [inputs] = attention_inputs(model, layers[:1], WINDOW)
    quantizers = pair(layers[0], "pre_rope", 2, 16)
    query, key = (inputs.rotated(x)[0].double() for x in (inputs.query, inputs.key))
    stored = inputs.decoded(quantizers, 0)[0][0].double()
    error = energy = 0.0
    for head, now in ((head, now) for head in range(len(query)) for now in range(len(WINDOW))):
        first = max(0, now + 1 - (layers[0].sliding_window or len(WINDOW)))
        own = head * len(key) // len(query)
        logits, lossy = (x[own, first : now + 1] @ query[head, now] for x in (key, stored))
        error += float((logits - lossy).square().sum())
        energy += float((logits - logits.mean()).square().sum())
    found = attention_errors(inputs, quantizers)
    assert found.logits == pytest.approx(error, rel=1e-4)
    assert found.logit_energy == pytest.approx(energy, rel=1e-4)
    assert found.relative()["logits"] == pytest.approx(error / energy, rel=1e-4)


def test_only_keys_change_logits_and_each_tensor_its_own_output(tiny_llama: LlamaForCausalLM) -> None:
    layer = attention_layers(tiny_llama)[1]
    keys, values = (errors_of(tiny_llama, layer, pair(layer, "pre_rope", *bits)) for bits in ((2, 16), (16, 2)))
    assert keys.logits > 0
    assert keys.output == keys.key_output > 0
    assert keys.value_output == values.logits == values.key_output == 0
    assert values.output == values.value_output > 0


def test_more_bits_make_smaller_errors(tiny_llama: LlamaForCausalLM) -> None:
    layer = attention_layers(tiny_llama)[0]
    two, four, eight = (errors_of(tiny_llama, layer, pair(layer, "post_rope", b, b)).relative() for b in (2, 4, 8))
    for name in RATIOS:
        assert 0 < eight[name] < four[name] < two[name]


@pytest.mark.parametrize("stage", ["pre_rope", "post_rope"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "smollm3"])
def test_identity_has_no_error_at_all(kind: str, stage: Stage) -> None:
    model, layers = supported(kind)
    for layer in layers:
        assert set(errors_of(model, layer, pair(layer, stage, 16, 16)).relative().values()) == {0.0}


@pytest.mark.parametrize("held", [1, 4 * 24 * 5, 4 * 24 * 23])
def test_long_windows_are_measured_in_parts(
    held: int, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = attention_layers(tiny_llama)[0]
    quantizers = pair(layer, "pre_rope", 3, 3)
    whole = errors_of(tiny_llama, layer, quantizers)
    monkeypatch.setattr(site_errors, "_LOGITS", held)
    parts = errors_of(tiny_llama, layer, quantizers)
    assert vars(parts) == pytest.approx(vars(whole), rel=1e-5)


def test_windows_add_up(tiny_llama: LlamaForCausalLM) -> None:
    one = AttentionErrors(logits=1.0, logit_energy=4.0)
    two = AttentionErrors(logits=3.0, logit_energy=12.0, output_energy=1.0)
    assert (one + two).relative() == {"logits": 0.25, "key_output": 0, "value_output": 0, "output": 0}
    assert AttentionErrors(logits=1.0).relative()["logits"] == math.inf


def test_first_tokens_stay_exact(tiny_llama: LlamaForCausalLM) -> None:
    layer = attention_layers(tiny_llama)[0]
    [inputs] = attention_inputs(tiny_llama, [layer], WINDOW)
    quantizers = pair(layer, "pre_rope", 2, 2)
    for stored, exact in zip(inputs.decoded(quantizers, 3), (inputs.rotated(inputs.key), inputs.value), strict=True):
        assert [torch.equal(stored[:, :, n], exact[:, :, n]) for n in range(4)] == [True, True, True, False]
    assert set(attention_errors(inputs, quantizers, sink_tokens=24).relative().values()) == {0.0}


def test_the_model_is_left_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    layers = attention_layers(tiny_llama)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.modules()]
    with pytest.raises(IndexError):
        attention_inputs(tiny_llama, layers, torch.tensor([64]))
    assert tiny_llama.training
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.modules()] == before


# --- many recipes over one full-precision pass


def everywhere(model: nn.Module, key_bits: int, value_bits: int) -> dict[Site, Quantizer]:
    layers = attention_layers(model)
    return {site: q for layer in layers for site, q in pair(layer, "pre_rope", key_bits, value_bits).items()}


def test_each_is_evaluated_as_if_alone(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(0, 64, (5, 24))
    candidates = [everywhere(tiny_llama, *bits) for bits in ((2, 4), (4, 4), (16, 16))]
    together = evaluate_each(tiny_llama, windows, candidates, batch_size=2)
    for found, candidate in zip(together, candidates, strict=True):
        alone = evaluate(tiny_llama, windows, candidate, batch_size=2)
        assert replace(found, seconds=0.0) == replace(alone, seconds=0.0)
    assert together[0].kl_mean > together[1].kl_mean > together[2].kl_mean == 0


def test_full_precision_runs_once_for_all(tiny_llama: LlamaForCausalLM) -> None:
    candidate = everywhere(tiny_llama, 4, 4)
    runs: list[int] = []
    tiny_llama.register_forward_pre_hook(lambda *_: runs.append(1))
    attention_layers(tiny_llama)
    probes = len(runs)
    evaluate_each(tiny_llama, torch.randint(0, 64, (6, 8)), [candidate] * 3, batch_size=2)
    assert len(runs) - 2 * probes == 3 * (1 + 3)


def test_average_bits_count_exact_tokens(tiny_llama: LlamaForCausalLM) -> None:
    mixed, windows = everywhere(tiny_llama, 4, 8), torch.randint(0, 64, (2, 24))
    found = evaluate(tiny_llama, windows, mixed, policy=CachePolicy(sink_tokens=6)).bits
    encoded = (found["key"] + found["value"]) / 2
    assert found["average"] == pytest.approx((18 * encoded + 6 * 32) / 24)


# --- the program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes, two texts and some recipes."""
    path = tmp_path_factory.mktemp("comparison")
    save_model(path / "model")
    save_tokenizer(path / "model")
    for seed, name in enumerate(("a.txt", "b.txt")):
        (path / name).write_text(prose(seed, 300))
    grid = "{method: uniform, bits: 4, per: token}"
    recipes = {
        "exact": "key: {method: identity}\nvalue: {method: identity}",
        "sinks": f"key: {grid}\nvalue: {grid}\nsink_tokens: 8",
        "rotated": f"stage: post_rope\nkey: {grid}\nvalue: {grid}",
        "recent": f"key: {grid}\nvalue: {grid}\ncache: {{residual_tokens: 16}}",
        "elsewhere": f"include: [layers.9.*]\nkey: {grid}\nvalue: {grid}",
    }
    for name, text in recipes.items():
        (path / f"{name}.yaml").write_text(f"name: {name}\n{text}\n")
    return path


COMMON = ["model", "--dataset", "b.txt", "--seqlen", "32", "--limit", "4", "--batch-size", "2"]


@pytest.fixture
def compare(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """Runs the program in the folder, without the picture; returns its status, what it printed, and what it said."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(report, "save_pareto", lambda *_: None)

    def call(more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = compare_recipes.main([*COMMON, "--calibration-dataset", "a.txt", "--nsamples", "3", *more.split()])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def results(folder: Path) -> dict:
    """What a comparison of five recipes, one of which cannot be, has left in `out`."""
    recipes = "exact.yaml,rotated.yaml,elsewhere.yaml,kvquant,sinks.yaml"
    text = ["--calibration-dataset", "a.txt", "--nsamples", "3", "--error-windows", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert compare_recipes.main([*COMMON, *text, "--recipes", recipes, "--output", "out"]) == 0
    return {**json.loads((folder / "out" / "results.json").read_text()), "folder": folder / "out"}


def test_the_table_of_the_documentation_finds_every_figure(results: dict) -> None:
    kind = KINDS["compared"]
    rows = kind.read(results, "")
    assert list(rows) == [recipe["name"] for recipe in results["recipes"]]
    printed = {
        line.split(" | ")[0].strip("| *"): line for line in (results["folder"] / "table.md").read_text().splitlines()
    }
    for name, figures in rows.items():
        cells = [column.cell(figures) for column in kind.columns]
        assert [cell.strip() for cell in printed[name].strip("|").split("|")[1:]] == cells
    assert kind.shared[0].cell(kept(kind.shared, results)) == f"{results['perplexity']:.4f}"


def test_gathering_is_timed_beside_bare_passes(results: dict) -> None:
    taken = results["seconds"]
    assert set(taken["gather"]) == {"pre_rope", "post_rope"}
    assert min(taken["gather"].values()) > 0
    assert taken["bare"]["calibration"] / 3 == pytest.approx(taken["bare"]["evaluation"] / 4)
    assert taken["bare"]["evaluation"] > 0


def test_rows_are_in_the_order_of_their_bits(results: dict) -> None:
    bits = [recipe["bits"]["average"] for recipe in results["recipes"]]
    assert bits == sorted(bits)
    assert {recipe["name"] for recipe in results["recipes"]} == {"exact", "rotated", "kvquant", "sinks"}
    assert results["recipes"][-1]["name"] == "exact"


def test_the_table_shows_what_the_json_holds(results: dict) -> None:
    text = (results["folder"] / "table.md").read_text()
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == len(results["recipes"])
    for row, recipe in zip(rows, results["recipes"], strict=True):
        shown = {name.strip(): cell.strip() for name, cell in zip(head, row, strict=True)}
        loss = f"{recipe['loss_nats']:.4f} ± {recipe['loss_nats_stderr']:.4f}"
        assert shown["recipe"].split() == [recipe["name"]]
        assert (shown["nats"], shown["KL"]) == (loss, f"{recipe['kl_mean']:.4f} ± {recipe['kl_mean_stderr']:.4f}")
        assert (shown["flips"], shown["evaluate"]) == (f"{recipe['top1_flips']:.2%}", f"{recipe['seconds']:.1f}")
        assert (shown["KL 99.9 %"], shown["fit"]) == (f"{recipe['kl_p999']:.3f}", f"{recipe['fit_seconds']:.2f}")
        counted = [recipe["bits"][name] for name in ("key", "value", "average")]
        spread = [recipe["amortised"][n] for n in ("2048", "32768", "131072")]
        assert [shown[n] for n in ("keys", "values", "mean", "2K", "32K", "128K")] == [
            f"{x:.2f}" for x in counted + spread
        ]
        for name, cell in (("logits", shown["logits"]), ("layer_output", shown["output"])):
            assert cell == f"{max(site.get(name, 0) for site in recipe['sites'].values()):.4f}"
    assert f"perplexity {results['perplexity']:.4f}" in text
    assert results["command"] in text
    assert f"of bare forward passes of the same windows: {results['seconds']['bare']['calibration']:.1f};" in text
    assert results["hardware"] in text


def test_every_site_has_its_errors(results: dict) -> None:
    by_name = {recipe["name"]: recipe for recipe in results["recipes"]}
    assert set(by_name["rotated"]["sites"]) == {
        f"layers.{layer}.{tensor}" for layer in (0, 1) for tensor in ("key.post_rope", "value")
    }
    for site, found in by_name["kvquant"]["sites"].items():
        assert 0 < found["output"] < 1
        assert found["layer_output"] > 0
        assert ("logits" in found) == ("key" in site)


def test_an_exact_recipe_loses_nothing(results: dict) -> None:
    exact = results["recipes"][-1]
    assert (exact["loss_nats"], exact["kl_mean"], exact["kl_p999"], exact["bits"]["average"]) == (0, 0, 0, 32)
    assert exact["worst"] == {"logits": 0, "output": 0}
    assert all(site.get("logits", 0) == site["output"] == 0 for site in exact["sites"].values())


def test_what_does_not_go_with_the_model_is_skipped_with_its_reason(results: dict) -> None:
    assert set(results["skipped"]) == {"elsewhere"}
    assert "layers.9.*" in results["skipped"]["elsewhere"]
    assert f"- elsewhere: {results['skipped']['elsewhere']}" in (results["folder"] / "table.md").read_text()


def test_the_provenance_is_kept(results: dict) -> None:
    assert results["calibration"] == {"text": "a.txt", "n_windows": 3, "seed": 0, "tier": "full"}
    assert results["evaluation"] == {"text": "b.txt", "n_windows": 4, "batch_size": 2, "protocol": "full"}
    assert (results["window_tokens"], results["error_windows"]) == (32, 2)
    assert set(results["versions"]) == {"kvgauge", "python", "transformers"}
    assert results["command"].startswith("kvgauge compare model --dataset b.txt")
    assert (results["folder"] / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_figures_are_those_of_the_two_commands(
    results: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(results["folder"].parent)
    file = ["--quantizer-path", str(tmp_path / "q.safetensors")]
    gather = ["model", "--dataset", "a.txt", "--seqlen", "32", "--nsamples", "3", "--statistics", "full"]
    assert calibrate_program.main([*gather, "--recipe", "kvquant", *file]) == 0
    capsys.readouterr()
    assert evaluate_program.main([*COMMON, *file, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    [found] = [recipe for recipe in results["recipes"] if recipe["name"] == "kvquant"]
    assert {**{name: found[name] for name in alone}, "seconds": 0} == {**alone, "seconds": 0}


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ("--recipes kvquant,kvqant", 1, "Did you mean kvquant?"),
        ("--recipes kvquant,kvquant", 2, "kvquant is there twice"),
        ("--recipes kvquant --output a.txt/out", 2, "--output a.txt/out: cannot make this folder"),
        ("--recipes sinks.yaml --seqlen 8", 2, "Use longer windows or fewer sink tokens."),
        ("--recipes elsewhere.yaml", 2, "none of the recipes fits this model: recipe elsewhere: include"),
        ("--recipes kvquant --calibration-dataset wikitxt2", 1, "wikitext2"),
    ],
)
def test_the_first_line_tells_how_to_mend_it(
    more: str, status: int, said: str, compare: Callable[[str], tuple[int, str, str]]
) -> None:
    found, out, err = compare(more)
    assert (found, out) == (status, "")
    [line] = [line for line in err.splitlines() if line.startswith("kvgauge compare: ")]
    assert said in line


class Stop:
    """Calls a function until it is called for the n-th time, which is Ctrl-C."""

    def __init__(self, function: Callable[..., Any], n: int) -> None:
        self._function, self._left = function, n

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        return self._function(*args, **kwargs)


STEPS = {
    "gathering": (capture, "token_batch", 3),
    "fitting": (comparison, "fit", 2),
    "errors": (comparison, "attention_errors", 6),
    "scores": (evaluation_run, "score", 3),
}


PAIR = "--recipes rotated.yaml,sinks.yaml --error-windows 2 --output {}"


def counted(patch: pytest.MonkeyPatch, step: str) -> list[int]:
    """A list that grows with every call of a step."""
    owner, name, _ = STEPS[step]
    calls, function = list[int](), getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    return calls


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[str, int]]:
    """What a comparison of two recipes finds, and how many calls of each step it takes."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        calls = {step: counted(patch, step) for step in STEPS}
        text = ["--calibration-dataset", "a.txt", "--nsamples", "3"]
        assert compare_recipes.main([*COMMON, *text, *PAIR.format(out).split()]) == 0
    found = json.loads((out / "results.json").read_text())
    return without_times(found), {step: len(own) for step, own in calls.items()}


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_comparison_goes_on_where_it_stopped(
    step: str,
    uninterrupted: tuple[dict, dict[str, int]],
    compare: Callable[[str], tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything used to be lost until the last window: hours, for many recipes."""
    whole, n_calls = uninterrupted
    owner, name, n = STEPS[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Stop(getattr(owner, name), n))
        status, out, err = compare(PAIR.format(tmp_path))
    assert (status, out) == (130, "")
    assert f"What is finished is in {tmp_path / 'kept'}; the same command goes on" in err
    calls = counted(monkeypatch, step)
    status, _, err = compare(PAIR.format(tmp_path))
    assert status == 0
    assert "going on from what an earlier run has finished" in err
    assert len(calls) < n_calls[step]
    assert without_times(json.loads((tmp_path / "results.json").read_text())) == whole


def without_times(results: dict) -> dict:
    recipes = [{**recipe, "seconds": 0, "fit_seconds": 0} for recipe in results["recipes"]]
    return {**results, "recipes": recipes, "command": "", "seconds": {}}


def test_what_is_finished_is_not_done_again_and_other_settings_start_anew(
    compare: Callable[[str], tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"--output {tmp_path / 'out'}"
    assert compare(f"--recipes rotated.yaml {output}")[0] == 0
    status, _, err = compare(f"--recipes rotated.yaml {output} --seed 1")
    assert status == 0
    assert "was made with other settings, texts or versions; this comparison starts from the beginning" in err

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError

    for owner, name, _ in STEPS.values():
        monkeypatch.setattr(owner, name, forbidden)
    assert compare(f"--recipes rotated.yaml {output}")[0] == 0


def test_other_windows_and_protocols_take_what_is_fitted(
    compare: Callable[[str], tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another --limit used to gather and fit everything again."""
    more = f"--recipes recent.yaml,rotated.yaml --output {tmp_path / 'out'}"
    assert compare(more)[0] == 0
    full = json.loads((tmp_path / "out" / "results.json").read_text())
    for owner, name, _ in (STEPS["gathering"], STEPS["fitting"]):
        monkeypatch.setattr(owner, name, Stop(lambda: None, 1))
    status, _, err = compare(f"{more} --protocol decode --limit 3")
    assert status == 0
    assert "going on from what an earlier run has finished" in err
    decode = json.loads((tmp_path / "out" / "results.json").read_text())
    assert decode["evaluation"]["protocol"] == "decode"
    by_name = [{row["name"]: row for row in found["recipes"]} for found in (full, decode)]
    assert by_name[0]["recent"]["kl_mean"] > by_name[1]["recent"]["kl_mean"]  # the last 16 tokens are exact
    assert compare(more)[0] == 0
    assert without_times(json.loads((tmp_path / "out" / "results.json").read_text())) == without_times(full)


def test_a_recipe_that_cannot_encode_is_skipped_and_the_others_go_on(
    compare: Callable[[str], tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky(inputs: object, quantizers: object, **sinks: int) -> AttentionErrors:
        if sinks["sink_tokens"]:
            raise ValueError("layers.0.value: a scale does not fit float16")
        return attention_errors(inputs, quantizers, **sinks)

    monkeypatch.setattr(comparison, "attention_errors", picky)
    status, _, err = compare(f"--recipes rotated.yaml,sinks.yaml --output {tmp_path / 'out'}")
    assert status == 0
    assert "skipped: layers.0.value: a scale does not fit float16" in err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [recipe["name"] for recipe in found["recipes"]] == ["rotated"]
    assert set(found["skipped"]) == {"sinks"}


def test_a_recipe_that_the_model_cannot_run_is_skipped(
    compare: Callable[[str], tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 computes values before keys: `predictive` used to end a comparison when all else was fitted."""

    def picky(model: nn.Module, artifact: Artifact, **more: Any) -> Any:
        if artifact.manifest.recipe["name"] == "sinks":
            raise MismatchError("layers.0.value: expected its sources to be computed first")
        return simulate(model, artifact, **more)

    monkeypatch.setattr(comparison, "simulate", picky)
    assert compare(f"--recipes rotated.yaml,sinks.yaml --output {tmp_path / 'out'}")[0] == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [recipe["name"] for recipe in found["recipes"]] == ["rotated"]
    assert found["skipped"] == {"sinks": "layers.0.value: expected its sources to be computed first"}


def test_as_many_first_tokens_are_exact_as_were_chosen(
    folder: Path, compare: Callable[[str], tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(*asked: object, **more: object) -> Artifact:
        fitted = fit(*asked, **more)
        return Artifact(dict(fitted), replace(fitted.manifest, sink_tokens=2))

    def seen(inputs: object, quantizers: object, **sinks: int) -> AttentionErrors:
        numbers.append(sinks["sink_tokens"])
        return attention_errors(inputs, quantizers, **sinks)

    numbers: list[int] = []
    monkeypatch.setattr(comparison, "fit", two)
    monkeypatch.setattr(comparison, "attention_errors", seen)
    (folder / "chosen.yaml").write_text("extends: rotated.yaml\nsink_tokens: auto\n")
    assert compare(f"--recipes chosen.yaml --error-windows 1 --output {tmp_path / 'out'}")[0] == 0
    assert set(numbers) == {2}


# --- the picture


def crowd(count: int) -> list[Point]:
    """Recipes around one curve, some of which seem to gain."""
    noise = torch.randn(count, dtype=torch.float64)
    bits = torch.linspace(1, 6, count, dtype=torch.float64)
    return [
        Point(f"{'abcdef'[n % 6]}-{n}", float(b), float(4 * 4**-b + 0.002 * e), 0.001 * (1 + n % 3))
        for n, (b, e) in enumerate(zip(bits, noise, strict=True))
    ]


def drawn(points: list[Point]) -> Figure:
    figure = Figure(figsize=(11, 7))
    FigureCanvasAgg(figure)
    plot_pareto(points, figure.subplots())
    return figure


def test_the_front_is_what_nothing_beats() -> None:
    points = crowd(40)
    front = pareto_front(points)
    for point in points:
        beaten = any(p.bits <= point.bits and p.nats <= point.nats and p is not point for p in points)
        assert (point in front) == (not beaten)


def test_losses_below_zero_are_shown_and_noise_is_linear() -> None:
    points = crowd(30)
    [axes] = drawn(points).axes
    low, high = axes.get_ylim()
    assert low < min(point.nats for point in points) < 0
    assert high > max(point.nats for point in points)
    assert axes.yaxis.get_transform().linthresh == pytest.approx(0.002)


@pytest.mark.parametrize("points", [crowd(1), [Point("a", 4.25, 0.0, math.nan), Point("b", 4.4, 0.1, math.nan)]])
def test_few_points_still_have_ticks_on_both_axes(points: list[Point]) -> None:
    [axes] = drawn(points).axes
    for ticks, (low, high) in ((axes.get_xticks(), axes.get_xlim()), (axes.get_yticks(), axes.get_ylim())):
        assert any(low <= tick <= high for tick in ticks)


def test_families_differ_without_colour() -> None:
    points = [Point(f"family{n}-{bits}", bits, 0.1 / bits, 0.01) for n in range(18) for bits in (2.0, 4.0)]
    [axes] = drawn(points).axes
    assert len({container.lines[0].get_marker() for container in axes.containers}) == len(axes.containers) == 18


def test_labels_cover_neither_points_nor_each_other() -> None:
    points = crowd(16)
    figure = drawn(points)
    [axes] = figure.axes
    figure.draw_without_rendering()
    label_points(points, axes)
    names = [text for text in axes.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in names]
    assert sorted(text.get_text() for text in names) == sorted(point.name for point in points)
    for number, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:number])
        assert not any(box.contains(*axes.transData.transform((point.bits, point.nats))) for point in points)


def test_infinite_losses_are_named_instead_of_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda _, title, **__: titles.append(title))
    save_pareto([*crowd(3), Point("broken", 2, math.inf, math.nan)], "title", tmp_path / "p.png")
    save_pareto([Point("broken", 2, math.inf, math.nan)], "title", tmp_path / "p.png")
    assert titles == ["title\nnot shown, the loss is not finite: broken"] * 2
