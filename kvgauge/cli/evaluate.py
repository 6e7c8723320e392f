"""`evaluate`: what a quantized cache costs a model, on text or in tasks, against the same model in full precision."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgauge.cli.options import common as options
from kvgauge.cli.options.foreign import add_normal_float
from kvgauge.cli.options.protocol import add_protocol_options
from kvgauge.cli.options.recipe import add_recipe_options
from kvgauge.cli.options.report import add_report_options, check_report_options
from kvgauge.cli.options.scoring import OF_TEXTS, add_scoring_options
from kvgauge.cli.options.tasks import PERPLEXITY, add_task_options, task_names
from kvgauge.running.evaluate_tasks import run_tasks
from kvgauge.running.evaluate_text import run_text
from kvgauge.running.evaluated import Evaluated, chosen_recipe, fitted, load_artifact
from kvgauge.running.lm_eval_adapter import OF_LM_EVAL, add_lm_eval_options, lm_eval_table, run_lm_eval
from kvgauge.terminal.console import Parser, UsageError, run, say, set_up_logging

if TYPE_CHECKING:
    from kvgauge.loading.models import LoadedModel
    from simquant.tasks import TaskResult


_OF_MODELS = ("model", "quantizer_path", "recipe", "abits", "tasks", "predictions", "lm_eval", "report", "resume")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("evaluate", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `evaluate`."""
    parser = Parser("evaluate", __doc__)
    options.add_model_options(parser)
    options.add_text_options(parser)
    add_recipe_options(parser, "that of the artifact; kvquant without one")
    parser.add_argument(
        "--quantizer-path", type=Path, metavar="FILE", help="what `calibrate` wrote; without it scales are dynamic"
    )
    add_normal_float(parser)
    add_protocol_options(parser)
    add_scoring_options(parser)
    add_task_options(parser)
    add_lm_eval_options(parser)
    add_report_options(parser)
    parser.add_argument("--limit", type=options.positive, metavar="N", help="windows at most (default: all)")
    parser.add_argument(
        "--batch-size", type=options.positive, default=1, metavar="N", help="windows per forward pass (default: 1)"
    )
    parser.add_argument(
        "--normalization",
        choices=("targets", "gptq"),
        default="targets",
        help="perplexity over all targets, or as GPTQ and KVQuant over the windows' means",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--nsamples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    return parser


def _main(argv: list[str]) -> int:
    if "--calibrate" in argv:
        from kvgauge.cli import calibrate

        return calibrate._main(argv)
    args = parser().parse_args(argv)
    set_up_logging(args.verbose)
    if args.score is None:
        _evaluate(args, argv)
    else:
        _score(args)
    return 0


def _score(args: argparse.Namespace) -> None:
    """Answers that were written earlier."""
    options.refuse_given(args, _OF_MODELS, "--score reads answers that are written; no model is run")
    from simquant.tasks import score_predictions

    _show(args, _tasks_report(args, score_predictions(args.score)))


def _show(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(found, indent=2, allow_nan=False), flush=True)


def _evaluate(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """A model that is run now."""
    artifact = load_artifact(args)
    recipe = chosen_recipe(args, artifact)
    if args.model is None and artifact is not None:
        args.model = artifact.manifest.model_id
        if args.model is None:
            raise UsageError(
                "name the model: evaluate MODEL --quantizer-path FILE (a local folder's path is not kept in the file)"
            )
    options.choose_defaults(args)
    names = task_names(args)
    if PERPLEXITY not in names:
        options.refuse_given(args, OF_TEXTS, "only losses on a text have it; add perplexity to --tasks")
    if args.lm_eval is None:
        options.refuse_given(args, OF_LM_EVAL, "no task of the harness is asked for; add --lm-eval")
    if args.report is not None or {PERPLEXITY, "drift"} & set(names):
        from calib.text.corpus import check_dataset

        for dataset in _datasets(args):
            check_dataset(dataset)
    check_report_options(args)
    from kvgauge.loading.models import load_model

    loaded = load_model(args)
    evaluated = fitted(args, loaded, artifact, recipe)
    found = _found(args, names, loaded, evaluated)
    _show(args, found)
    if args.report is not None:
        _report(args, argv, loaded, evaluated, found)


def _found(
    args: argparse.Namespace, names: Sequence[str], loaded: "LoadedModel", evaluated: Evaluated
) -> dict[str, Any]:
    """Texts, tasks and the harness's tasks, whichever are asked for."""
    found: dict[str, Any] = {}
    if PERPLEXITY in names:
        results = {dataset: run_text(args, loaded, evaluated, dataset) for dataset in _datasets(args)}
        found = next(iter(results.values())) if len(results) == 1 else {"datasets": results}
    tasks = [name for name in names if name != PERPLEXITY]
    if tasks:
        found |= _tasks_report(args, run_tasks(args, tasks, loaded, evaluated))
    if args.lm_eval is not None:
        result = run_lm_eval(args, loaded, evaluated.quantizers, evaluated.settings(args, "cache")["policy"])
        found |= {"lm_eval": result}
        if not args.json:
            print(lm_eval_table(result))
    return found


def _datasets(args: argparse.Namespace) -> list[str]:
    return [name for name in args.dataset.split(",") if name] or [args.dataset]


def _report(
    args: argparse.Namespace, argv: Sequence[str], loaded: "LoadedModel", evaluated: Evaluated, found: dict[str, Any]
) -> None:
    from kvgauge.report.gather import gather
    from kvgauge.report.page import write_report
    from kvgauge.report.reported_run import ReportedRun

    write_report(args.report, gather(ReportedRun.of(args, argv, loaded, evaluated, found)))
    say(f"report: {args.report / 'report.html'}")


def _tasks_report(args: argparse.Namespace, results: "Sequence[TaskResult]") -> dict[str, Any]:
    if not args.json:
        print("\n\n".join([*(result.table() for result in results), f"protocol: {results[0].protocol}"]))
    return {"tasks": {result.task: result.to_json() for result in results}}


if __name__ == "__main__":
    sys.exit(main())
