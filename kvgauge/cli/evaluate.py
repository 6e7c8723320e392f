"""Measure the loss of a quantized cache against the same model in full precision, on text or in tasks."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgauge.cli.options import common as options
from kvgauge.cli.options.common import parsed
from kvgauge.cli.options.foreign import add_normal_float
from kvgauge.cli.options.harness import OF_LM_EVAL, add_lm_eval_options
from kvgauge.cli.options.protocol import add_protocol_options
from kvgauge.cli.options.recipe import add_recipe_options
from kvgauge.cli.options.report import add_report_options, check_report_options
from kvgauge.cli.options.scoring import OF_TEXTS, add_scoring_options
from kvgauge.cli.options.tasks import add_task_options
from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.fields import refuse_given
from kvgauge.configuration.tasks import PERPLEXITY, task_names
from kvgauge.running.evaluate_tasks import run_tasks
from kvgauge.running.evaluate_text import run_text
from kvgauge.running.evaluated import Evaluated, chosen_recipe, fitted, load_artifact
from kvgauge.running.lm_eval_adapter import lm_eval_table, run_lm_eval
from kvgauge.terminal.console import Parser, UsageError, run, say, set_up_logging

if TYPE_CHECKING:
    from kvgauge.loading.models import LoadedModel
    from simquant.tasks import TaskResult


_EXAMPLES = "Examples: evaluate demo --abits 4; evaluate MODEL --quantizer-path q.safetensors --dataset wikitext2"

_OF_MODELS = ("model", "quantizer_path", "recipe", "abits", "tasks", "predictions", "lm_eval", "report", "resume")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("evaluate", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `evaluate`."""
    parser = Parser("evaluate", __doc__, epilog=_EXAMPLES)
    options.add_model_options(parser)
    options.add_text_options(parser)
    group = parser.add_argument_group("quantizers (one of --quantizer-path, --abits, --recipe is needed)")
    group.add_argument(
        "--quantizer-path",
        type=Path,
        metavar="FILE",
        help="artifact that `calibrate` wrote, or a file of KVQuant, LLaMA3-simquant or msModelSlim; without it each "
        "token's or block's own scales are used, without calibration",
    )
    add_normal_float(group)
    add_recipe_options(parser, "the artifact's; without an artifact kvquant")
    add_protocol_options(parser)
    add_scoring_options(parser)
    add_task_options(parser)
    add_lm_eval_options(parser)
    add_report_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--nsamples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    return parser


def _main(argv: list[str]) -> int:
    # One script of LLaMA3-simquant does both, and this word tells which.
    if "--calibrate" in argv:
        from kvgauge.cli import calibrate

        return calibrate._main(argv)
    config = parsed(EvaluateConfig, parser().parse_args(argv))
    set_up_logging(config.verbose)
    if config.tasks.score is None:
        _evaluate(config, argv)
    else:
        _score(config, config.tasks.score)
    return 0


def _score(config: EvaluateConfig, answers: Path) -> None:
    """Answers that were written earlier."""
    refuse_given(config, _OF_MODELS, "no effect with --score, which runs no model; remove it")
    from simquant.tasks import score_predictions

    _show(config, _tasks_report(config, score_predictions(answers)))


def _show(config: EvaluateConfig, found: dict[str, Any]) -> None:
    if config.json:
        print(json.dumps(found, indent=2, allow_nan=False), flush=True)


def _evaluate(config: EvaluateConfig, argv: Sequence[str]) -> None:
    """A model that is run now."""
    path = config.quantizer_path
    artifact = load_artifact(path, config.recipe)
    recipe = chosen_recipe(config.recipe, artifact, path)
    own = None if artifact is None else artifact.manifest.model_id
    if config.model.model is None and artifact is not None and own is None:
        raise UsageError(
            f"{path}: does not record its model, which was a local folder; type evaluate MODEL --quantizer-path {path}"
        )
    config = config.of_model(own)
    names = _checked_names(config)
    check_report_options(config.report)
    from kvgauge.loading.models import load_model

    loaded = load_model(config.model)
    evaluated = fitted(loaded, artifact, recipe, config.recipe.sink_tokens)
    found = _found(config, names, loaded, evaluated)
    _show(config, found)
    if config.report.report is not None:
        _report(config, argv, loaded, evaluated, found)


def _checked_names(config: EvaluateConfig) -> tuple[str, ...]:
    """The tasks, when no option is without effect, and the texts are there.

    Raises
    ------
    UsageError
        If an option belongs to something that is not asked for.
    """
    names = task_names(config.tasks, harness=config.harness.lm_eval is not None)
    if PERPLEXITY not in names:
        refuse_given(config, OF_TEXTS, "no effect without a loss on text; add perplexity to --tasks")
    if config.harness.lm_eval is None:
        refuse_given(config, OF_LM_EVAL, "no effect without --lm-eval; add it")
    if config.report.report is not None or {PERPLEXITY, "drift"} & set(names):
        from calib.text.corpus import check_dataset

        for dataset in config.text.datasets:
            check_dataset(dataset)
    return names


def _found(config: EvaluateConfig, names: Sequence[str], loaded: "LoadedModel", evaluated: Evaluated) -> dict[str, Any]:
    """Texts, tasks and the harness's tasks, whichever are asked for."""
    found: dict[str, Any] = {}
    if PERPLEXITY in names:
        results = {dataset: run_text(config, loaded, evaluated, dataset) for dataset in config.text.datasets}
        found = next(iter(results.values())) if len(results) == 1 else {"datasets": results}
    tasks = [name for name in names if name != PERPLEXITY]
    if tasks:
        found |= _tasks_report(config, run_tasks(config, tasks, loaded, evaluated))
    if config.harness.lm_eval is not None:
        policy = evaluated.settings(config, "cache")["policy"]
        result = run_lm_eval(config.harness, loaded, evaluated.quantizers, policy, seed=config.text.seed)
        found |= {"lm_eval": result}
        if not config.json:
            print(lm_eval_table(result))
    return found


def _report(
    config: EvaluateConfig, argv: Sequence[str], loaded: "LoadedModel", evaluated: Evaluated, found: dict[str, Any]
) -> None:
    from kvgauge.report.gather import gather
    from kvgauge.report.page import write_report
    from kvgauge.report.reported_run import ReportedRun

    assert config.report.report is not None
    write_report(config.report.report, gather(ReportedRun.of(config, argv, loaded, evaluated, found)))
    say(f"report: {config.report.report / 'report.html'}")


def _tasks_report(config: EvaluateConfig, results: "Sequence[TaskResult]") -> dict[str, Any]:
    if not config.json:
        print("\n\n".join([*(result.table() for result in results), f"protocol: {results[0].protocol}"]))
    return {"tasks": {result.task: result.to_json() for result in results}}


if __name__ == "__main__":
    sys.exit(main())
