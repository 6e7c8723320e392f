"""Measures the demo model: solved tasks, and loss of quantized keys; writes the figures that its model card quotes."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from artifacts.artifact import Artifact
from calib.calibration import calibrate
from calib.capture import site_shapes
from calib.demo.tasks import TASKS
from calib.demo.trials import is_solved, trials
from calib.recipe.layer_choice import resolve
from calib.recipe.recipe import load_recipe
from calib.text.corpus import load_corpus
from calib.text.windows import sample_windows, split_windows
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import LoadedModel, load_model
from kvgauge.terminal.console import bar, run, set_up_logging
from simquant import evaluate_each

PASSKEY_TRIALS, TASK_TRIALS = 400, 100
PASSKEY_WORDS = 880
TASK_WORDS = (100, 300, 800)
"""Words of filler text around a task; a word or a sign is about a token."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("measure_demo_model", _main, argv)


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("measure_demo_model", description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="the bundled model, or a folder (default: demo)")
    parser.add_argument("--output", type=Path, help="folder for figures.json, and for curves.png from its log.jsonl")
    args = parser.parse_args(argv)
    set_up_logging(verbose=False)
    loaded = load_model(ModelConfig(model=args.model, device="cpu", dtype="float32"))
    found = json.dumps(figures(loaded), indent=1)
    print(found)
    if args.output:
        (args.output / "figures.json").write_text(found + "\n")
        save_curves(args.output)
    return 0


def save_curves(folder: Path) -> None:
    """Draws the training log: losses above, shares of solved trials below."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    reports = [row for row in rows if "held_out" in row]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    above.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], label="training windows")
    above.plot([row["tokens"] / 1e6 for row in reports], [row["held_out"] for row in reports], label="held-out pages")
    above.set(ylabel="nats per token", title="the windows grow: 128, 256, 512, 1024 tokens", ylim=(0, 4))
    for task in TASKS:
        below.plot([row["tokens"] / 1e6 for row in reports], [row[task] for row in reports], label=task)
    below.set(xlabel="million tokens", ylabel="share of trials solved", ylim=(-0.02, 1.02))
    for axes in (above, below):
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


def figures(loaded: LoadedModel) -> dict[str, Any]:
    """All figures: shares of solved trials, and losses in nats per token."""
    return {
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "passkey": solved(loaded, "passkey", PASSKEY_WORDS, PASSKEY_TRIALS),
        "tasks": {
            task: {words: solved(loaded, task, words, TASK_TRIALS)["share"] for words in TASK_WORDS} for task in TASKS
        },
        "keys_3_bits": key_losses(loaded),
    }


def solved(loaded: LoadedModel, task: str, n_words: int, count: int) -> dict[str, Any]:
    """Share of the trials that greedy decoding solves, and the shortest and longest of them in tokens."""
    drawn = list(trials(task, n_words, count))
    right = [is_solved(loaded.model, loaded.tokenizer, trial) for trial in bar(drawn, f"{task}, {n_words} words")]
    lengths = [len(loaded.encode(trial.prompt)) for trial in drawn]
    return {"trials": count, "share": sum(right) / count, "tokens": [min(lengths), max(lengths)]}


def key_losses(loaded: LoadedModel, n_windows: int | None = None) -> dict[str, Any]:
    """Losses of 3-bit uniform keys, without outliers, values in full precision: scales per token and per channel."""
    seqlen = loaded.context
    sampled = sample_windows(load_corpus("demo", "calibration", loaded.encode), n_windows=16, seqlen=seqlen, seed=0)
    held_out = split_windows(load_corpus("demo", "evaluation", loaded.encode), seqlen=seqlen, limit=n_windows)
    recipe = load_recipe("kvquant").edited({"value": {"method": "identity"}, "key": {"bits": 3}})
    # Keys of the demo model have channels far from zero: a scale per token spans them, a scale per channel does not.
    static: Artifact = calibrate(loaded.model, sampled, recipe=recipe)
    per_token = recipe.edited({"key": {"per": "token"}})
    shapes = {shape.site: shape for shape in site_shapes(loaded.layers(), recipe.stage)}
    estimators = resolve(per_token, list(shapes.values()))
    dynamic = {site: estimator.dynamic(shapes[site]) for site, estimator in estimators.items()}
    found = evaluate_each(loaded.model, held_out, [dynamic, static])
    results = dict(zip(("per_token", "per_channel"), found, strict=True))
    losses = {name: [result.loss_nats, result.loss_nats_stderr] for name, result in results.items()}
    return {
        "perplexity": results["per_token"].fp_perplexity,
        "loss": losses,
        "kl": {name: result.kl_mean for name, result in results.items()},
        "ratio": losses["per_token"][0] / losses["per_channel"][0],
    }


if __name__ == "__main__":
    sys.exit(main())
