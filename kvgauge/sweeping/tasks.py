"""Tasks of a sweep: a closed table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from artifacts.artifact import Artifact
from artifacts.model.evidence import text_config
from calib.text.corpus import CorpusError
from calib.text.windows import check_vocabulary, split_windows
from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.protocol import protocol_settings
from kvgauge.configuration.tasks import PERPLEXITY
from kvgauge.loading.models import LoadedModel
from kvgauge.running.evaluate_tasks import run_tasks
from kvgauge.running.evaluate_text import tell, warn_of_overlap
from kvgauge.running.evaluated import Evaluated
from kvgauge.sweeping.cell import Cell
from simquant import evaluate
from simquant.tasks import TASKS as ANSWERED


@dataclass(frozen=True)
class Bench:
    """A cell when all is ready: the model is loaded, the recipe fitted.

    Parameters
    ----------
    cell : Cell
        What is to be run.
    loaded : LoadedModel
        Its model.
    artifact : Artifact
        Its recipe, fitted.
    answers : Path or None
        Where the answers to a task are kept while it runs.
    """

    cell: Cell
    loaded: LoadedModel
    artifact: Artifact
    answers: Path | None = None

    @property
    def config(self) -> EvaluateConfig:
        """The evaluation of the cell, as if it had been typed."""
        return self.cell.settings.evaluation(self.cell.model)

    def protocol(self) -> dict[str, Any]:
        """Policy, protocol and chunking, as `simquant.evaluate` takes them."""
        return protocol_settings(self.config.protocol, self.artifact, self.artifact.manifest.sink_tokens)

    def windows(self) -> Int64[Tensor, "windows tokens"]:
        """Of the evaluation text, as many as the settings say, from `first_window` on.

        Raises
        ------
        CorpusError
            If the text holds too few, or token ids that the model does not know.
        """
        own, wanted, first = self.config.text, self.config.scoring.limit, self.cell.first_window
        text = self.loaded.corpus(own.source, "evaluation", own.field)
        limit = None if wanted is None else first + wanted
        seqlen, start_token = self.loaded.window_tokens(own.seqlen), self.loaded.start_token(own.bos)
        windows = split_windows(text, seqlen=seqlen, limit=limit, start_token=start_token)
        if first and limit is not None and len(windows) < limit:
            raise CorpusError(
                f"{text.name}: expected {limit} windows, half of them held out; it has {len(windows)}. "
                f"Use limit: {len(windows) // 2}, a smaller seqlen, or more text"
            )
        check_vocabulary(windows, text_config(self.loaded.model).vocab_size, text.name)
        return windows[first:]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A result in a row: what the quantized cache costs, and the figures on both sides of it."""

    metric: str
    value: float | None
    stderr: float | None
    fp: float | None
    quantized: float | None
    n: int


@dataclass(frozen=True)
class SweepTask:
    """A function that runs a task, to JSON values, and one that picks the figures for the summary."""

    run: Callable[[Bench], dict[str, Any]]
    headline: Callable[[Mapping[str, Any]], Headline]


def _perplexity(bench: Bench) -> dict[str, Any]:
    windows = bench.windows()
    warn_of_overlap(bench.artifact, windows)
    settings = bench.cell.settings
    result = evaluate(bench.loaded.model, windows, bench.artifact, **bench.protocol(), batch_size=settings.batch_size)
    tell(result)
    return result.to_json()


def _perplexity_headline(result: Mapping[str, Any]) -> Headline:
    return Headline(
        metric="nats lost",
        value=result["loss_nats"],
        stderr=result["loss_nats_stderr"],
        fp=result["fp"]["perplexity"],
        quantized=result["quantized"]["perplexity"],
        n=result["n_targets"],
    )


def _answers(bench: Bench) -> dict[str, Any]:
    config = bench.config
    config = replace(config, tasks=replace(config.tasks, predictions=bench.answers))
    evaluated = Evaluated(quantizers=bench.artifact, sink_tokens=bench.artifact.manifest.sink_tokens)
    [result] = run_tasks(config, [bench.cell.task], bench.loaded, evaluated)
    return result.to_json()


def _answers_headline(result: Mapping[str, Any]) -> Headline:
    return Headline(
        metric=result["metric"].partition(":")[0],
        value=result["difference"],
        stderr=result["difference_stderr"],
        fp=result["fp"],
        quantized=result["quantized"],
        n=result["n"],
    )


TASKS: Mapping[str, SweepTask] = {
    PERPLEXITY: SweepTask(_perplexity, _perplexity_headline),
    **dict.fromkeys(ANSWERED, SweepTask(_answers, _answers_headline)),
}
"""By name."""
