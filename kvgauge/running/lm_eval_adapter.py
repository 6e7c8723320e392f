"""Tasks of lm-evaluation-harness on a packed cache: the scores of both models."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from kvgauge.configuration.harness import HarnessConfig
from kvgauge.terminal.console import UsageError, bar

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site
    from kvgauge.loading.models import LoadedModel
    from kvgauge.running.lm_eval_respondent import Respondent
    from simquant import CachePolicy, Usage


def run_lm_eval(
    config: HarnessConfig,
    loaded: "LoadedModel",
    quantizers: "Artifact | Mapping[Site, Quantizer]",
    policy: "CachePolicy",
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs the harness on both models; scores by task and metric, and in `protocol` how the quantized one was run.

    Raises
    ------
    UsageError
        If lm-eval is not installed, the model has no tokenizer, or there is no such task.
    NothingQuantizedError
        If fewer than 16 bits were asked for and no token was quantized.
    """
    from artifacts.model.hooks import evaluating
    from kvgauge.running.lm_eval_respondent import Respondent
    from simquant import NothingQuantizedError, Usage, packed_cache
    from simquant.tasks.protocol import quantized_line

    if loaded.tokenizer is None:
        raise UsageError(
            "--lm-eval: the model has no tokenizer that can be loaded; put its tokenizer files beside the weights"
        )
    evaluate = _asked(config, seed)
    layers, usage = loaded.layers(), Usage(quantizers)
    speaker = partial(Respondent, model=loaded.model, tokenizer=loaded.tokenizer, context_tokens=loaded.context)
    with evaluating(loaded.model):
        with packed_cache(loaded.model, quantizers, policy=policy, layers=layers) as new_cache:
            quantized = evaluate(speaker(new_cache=new_cache, done=partial(_count, usage)))
        if usage.quantized_fraction == 0 and any(quantizer.spec.bits < 16 for quantizer in quantizers.values()):
            raise NothingQuantizedError(
                f"--lm-eval {config.lm_eval}: fewer than 16 bits were asked for and no token was quantized "
                f"({policy.describe()}). Take longer texts or keep fewer tokens exact."
            )
        exact = evaluate(speaker())
    return {
        "tasks": {task: _compared(task, exact, quantized) for task in exact["results"]},
        "quantized_fraction": usage.quantized_fraction,
        "protocol": f"{quantized_line(loaded.model, layers, quantizers, policy, None)}; continuations in one step",
    }


def lm_eval_table(result: Mapping[str, Any]) -> str:
    """Table of the scores, for people."""
    rows = [_row(task, *found) for task, metrics in result["tasks"].items() for found in metrics.items()]
    return "\n".join([*rows, f"quantized_fraction: {result['quantized_fraction']:.6g}", result["protocol"]])


def harness_model(respondent: "Respondent") -> Any:
    """A model as the harness wants it.

    Raises
    ------
    UsageError
        If lm-eval is not installed.
    """

    def each(reply: Callable[..., Any]) -> Callable[..., list[Any]]:
        return lambda self, requests: [reply(*request.args) for request in bar(requests, reply.__name__)]

    # The base class belongs to an optional package, so that the class is made when it is needed, not when this file is
    # imported.
    replies = (respondent.loglikelihood, respondent.loglikelihood_rolling, respondent.generate_until)
    return type("PackedCacheModel", (_lm_eval("api.model").LM,), {reply.__name__: each(reply) for reply in replies})()


def _lm_eval(module: str = "") -> Any:
    """The package or one of its modules, which only `--lm-eval` needs."""
    try:
        return importlib.import_module(f"lm_eval.{module}".rstrip("."))
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UsageError("--lm-eval: lm-evaluation-harness is not installed; type pip install lm-eval") from error


def _asked(config: HarnessConfig, seed: int) -> Callable[["Respondent"], dict[str, Any]]:
    """A run of the harness as the command line asks for it; the index of its tasks is read once, which takes long."""
    evaluate = _lm_eval().simple_evaluate
    manager = _lm_eval("tasks").TaskManager(include_path=config.lm_eval_include and str(config.lm_eval_include))
    unknown = [name for name in config.names if not manager.match_tasks([name])]
    if unknown or not config.names:
        what = ", ".join(unknown) or repr(config.lm_eval)
        raise UsageError(f"--lm-eval: the harness has no task {what}; list them with: lm-eval ls tasks")
    # All of them: both models must be asked with the same few-shot examples, in the same order.
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    return lambda respondent: evaluate(
        model=harness_model(respondent),
        tasks=config.names,
        num_fewshot=config.lm_eval_fewshot,
        limit=config.lm_eval_limit,
        task_manager=manager,
        **dict.fromkeys(seeds, seed),
    )


def _compared(task: str, exact: Mapping[str, Any], quantized: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of a task, by `metric,filter` as the harness writes it."""
    fp, own = exact["results"][task], quantized["results"][task]
    found = {}
    for key, value in fp.items():
        metric, _, variant = key.partition(",")
        if not variant or metric.endswith("_stderr") or _number(value) is None:
            continue
        stderr = f"{metric}_stderr,{variant}"
        found[key] = {
            "n": exact.get("n-samples", {}).get(task, {}).get("effective"),
            "fp": value,
            "fp_stderr": _number(fp.get(stderr)),
            "quantized": own[key],
            "quantized_stderr": _number(own.get(stderr)),
            **_difference(*(_by_document(each, task, metric, variant) for each in (exact, quantized))),
        }
    return found


def _by_document(found: Mapping[str, Any], task: str, metric: str, variant: str) -> dict[int, float]:
    """The values of single documents, where the metric has such."""
    samples = [sample for sample in found.get("samples", {}).get(task, []) if sample.get("filter") == variant]
    values = {sample["doc_id"]: _number(sample.get(metric)) for sample in samples}
    return {document: value for document, value in values.items() if value is not None}


def _difference(exact: Mapping[int, float], quantized: Mapping[int, float]) -> dict[str, float]:
    """Of means over documents, paired; what is no mean has none."""
    from simquant.evaluation.figures import mean_and_stderr

    if len(exact) < 2 or exact.keys() != quantized.keys():
        return {}
    # Paired by document: both models meet the same hard documents, which cancel in the difference and in its error.
    difference, stderr = mean_and_stderr([quantized[document] - exact[document] for document in exact])
    return {"difference": difference, "difference_stderr": stderr}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _row(task: str, metric: str, found: Mapping[str, Any]) -> str:
    row = f"{task}, {metric}, n = {found['n']}: {found['fp']:.4f} -> {found['quantized']:.4f}"
    if "difference" not in found:
        return row
    return f"{row}, difference {found['difference']:+.4f}, standard error {found['difference_stderr']:.4f}"


def _count(usage: "Usage", cache: Any) -> None:
    for layer in cache.layers:
        for site, store in layer.store.stores():
            usage.add_store(site, store)
