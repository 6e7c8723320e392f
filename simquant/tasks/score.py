"""Scoring of predictions from a file, without a model."""

import difflib
import logging
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from simquant.evaluate import NothingQuantizedError
from simquant.evaluation.figures import mean_and_stderr
from simquant.tasks.errors import TaskError
from simquant.tasks.prediction import Prediction, read_predictions
from simquant.tasks.result import TaskResult
from simquant.tasks.table import TASKS
from simquant.tasks.task import Task

logger = logging.getLogger(__name__)

Pair = tuple[Prediction, Prediction]


def score_predictions(
    path: Path, tasks: Mapping[str, Task] = TASKS, *, only: Container[tuple[str, str]] | None = None
) -> list[TaskResult]:
    """Results of all tasks in a file of predictions, in its order.

    Parameters
    ----------
    path : Path
        File written by `predict`.
    tasks : mapping from str to Task
        Tasks by name.
    only : container of (task, id) or None
        Items that count; None is all.

    Raises
    ------
    TaskError
        If the file is damaged, has answers of several protocols or of an unknown task, or if both models have answered
        no item of some task.
    NothingQuantizedError
        If fewer than 16 bits were asked for, and no token of a task was quantized.
    """
    predictions = [p for p in read_predictions(path) if only is None or (p.task, p.id) in only]
    for side in ("fp", "quantized"):
        protocols = {prediction.protocol for prediction in predictions if prediction.side == side}
        if len(protocols) > 1:
            raise TaskError(
                f"{path}: expected answers of one protocol; got\n  "
                + "\n  ".join(sorted(protocols))
                + "\nSplit the file by protocol."
            )
    by_task: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_task[prediction.task].append(prediction)
    return [_result(named(tasks, name), _pairs(path, name, own)) for name, own in by_task.items()]


def named(tasks: Mapping[str, Task], name: str) -> Task:
    """Task of that name.

    Raises
    ------
    TaskError
        If there is none; the message has the nearest name.
    """
    if name in tasks:
        return tasks[name]
    close = difflib.get_close_matches(name, tasks, n=1)
    raise TaskError(
        f"{name}: expected a task among {', '.join(tasks)}" + (f"; did you mean {close[0]}?" if close else "")
    )


def check_quantized(task: str, predictions: Iterable[Prediction]) -> float | None:
    """Share of the cached tokens that were quantized in the answers to a task; None without quantization.

    Raises
    ------
    NothingQuantizedError
        If quantizers have fewer than 16 bits and the share is zero.
    """
    counted = [(p.quantized_fraction, p.n_prompt_tokens + len(p.tokens)) for p in predictions if p.side == "quantized"]
    asked = [(fraction, n_tokens) for fraction, n_tokens in counted if fraction is not None]
    if not asked:
        return None
    # Fractions of single answers are weighted by their tokens, so that the share is one of cached tokens.
    total = sum(n_tokens for _, n_tokens in asked)
    share = sum(fraction * n_tokens for fraction, n_tokens in asked) / total if total else 0.0
    if share == 0:
        raise NothingQuantizedError(
            f"{task}: fewer than 16 bits were asked for and no token was quantized in {len(asked)} prompts of at most "
            f"{max(n_tokens for _, n_tokens in asked)} tokens, answers included, or none was read: an exact prefill "
            "answers with its first token. Use longer prompts or answers, or keep fewer tokens in full precision."
        )
    return share


def _pairs(path: Path, task: str, predictions: Sequence[Prediction]) -> list[Pair]:
    formats = {prediction.format for prediction in predictions}
    if len(formats) > 1:
        raise TaskError(
            f"{path}: {task}: expected answers to prompts of one --task-format; got {' and '.join(sorted(formats))}. "
            "Split the file by format."
        )
    exact = {prediction.id: prediction for prediction in predictions if prediction.side == "fp"}
    quantized = {prediction.id: prediction for prediction in predictions if prediction.side == "quantized"}
    pairs = [(exact[id], quantized[id]) for id in quantized if id in exact]
    if not pairs:
        raise TaskError(
            f"{path}: {task}: expected items that both models answered; got {len(exact)} answers in full precision and "
            f"{len(quantized)} quantized ones. Complete them with evaluate --predictions {path}"
        )
    for fp, other in pairs:
        if fp.question != other.question:
            raise TaskError(
                f"{path}: {task} {fp.id}: expected the same prompt, references and choices for both models; got "
                "different ones. Remove both lines, and run evaluate --predictions again."
            )
    alone = len(exact) + len(quantized) - 2 * len(pairs)
    if alone:
        logger.warning("%s: %s: %d answers of one model only are left out", path, task, alone)
    return pairs


def _result(task: Task, pairs: Sequence[Pair]) -> TaskResult:
    # Both models answer the same items, so that the error of the difference is that of the paired differences.
    scores = [task.scores(*pair) for pair in pairs]
    fp, fp_stderr = mean_and_stderr([exact for exact, _ in scores])
    quantized, quantized_stderr = mean_and_stderr([own for _, own in scores])
    difference, difference_stderr = mean_and_stderr([own - exact for exact, own in scores])
    name = pairs[0][0].task
    return TaskResult(
        task=name,
        metric=task.metric,
        format=pairs[0][0].format,
        n=len(pairs),
        fp=fp,
        fp_stderr=fp_stderr,
        quantized=quantized,
        quantized_stderr=quantized_stderr,
        difference=difference,
        difference_stderr=difference_stderr,
        cells=_cells(pairs, scores),
        others=_means([task.others(*pair) for pair in pairs]),
        quantized_fraction=check_quantized(name, [own for _, own in pairs]),
        protocol=pairs[0][1].protocol,
    )


def _cells(pairs: Sequence[Pair], scores: Sequence[tuple[float, float]]) -> tuple[Mapping[str, object], ...]:
    # The coordinates of a cell as a hashable key, so that items of equal coordinates meet in one cell.
    found: dict[tuple[tuple[str, object], ...], list[tuple[float, float]]] = defaultdict(list)
    for (fp, _), both in zip(pairs, scores, strict=True):
        found[tuple(fp.cell.items())].append(both)
    return tuple({**dict(cell), "n": len(own), **_both(own)} for cell, own in sorted(found.items(), key=_order) if cell)


def _order(entry: tuple[tuple[tuple[str, object], ...], object]) -> list[tuple[str, bool, float, str]]:
    """Sort key of a cell: coordinates by name, numbers by size and before words."""
    return [
        (name, isinstance(value, str), 0.0 if isinstance(value, str) else float(str(value)), str(value))
        for name, value in entry[0]
    ]


def _means(figures: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, Mapping[str, float]]:
    return {name: _both([own[name] for own in figures]) for name in figures[0]}


def _both(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {
        "fp": mean_and_stderr([exact for exact, _ in scores])[0],
        "quantized": mean_and_stderr([own for _, own in scores])[0],
    }
