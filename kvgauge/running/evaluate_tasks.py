"""Tasks for `evaluate`: answers of both models, and their scores."""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvgauge.cli.options.common import DEMO
from kvgauge.terminal.console import UsageError, bar

if TYPE_CHECKING:
    from kvgauge.loading.models import LoadedModel
    from kvgauge.running.evaluated import Evaluated
    from simquant.tasks import Task, TaskOptions, TaskResult

_DRIFT_TOKENS = 256
"""Of a prompt of `drift`, unless --task-lengths says otherwise."""


def run_tasks(
    args: argparse.Namespace, names: Sequence[str], loaded: "LoadedModel", evaluated: "Evaluated"
) -> "list[TaskResult]":
    """Asks both models all items of the tasks, and scores their answers; a prompt enters the cache at once by default.

    Parameters
    ----------
    args : argparse.Namespace
        With the options of tasks and protocol.
    names : sequence of str
        Of tasks, without groups.
    loaded : LoadedModel
        Model and tokenizer.
    evaluated : Evaluated
        The quantizers of the cache.

    Raises
    ------
    UsageError
        If the model has no tokenizer.
    TaskError, NothingQuantizedError
        See `simquant.tasks.predict`.
    """
    from simquant.tasks import predict, score_predictions

    if loaded.tokenizer is None:
        raise UsageError("--tasks needs text: the model has no tokenizer that could be loaded")
    tasks, options = _tasks(args), _options(args, names, loaded)
    settings = evaluated.settings(args, protocol="cache")
    items = [item for name in names for item in tasks[name].items(options)]
    with _predictions_file(args.predictions) as path:
        predict(
            loaded.model,
            loaded.tokenizer,
            items,
            evaluated.quantizers,
            path,
            policy=settings["policy"],
            steps=settings["steps"] if args.prefill_tokens or args.chunk_tokens else None,
            progress=lambda own: bar(own, "answering"),
        )
        return score_predictions(path, tasks, only={(item.task, item.id) for item in items})


def _tasks(args: argparse.Namespace) -> "Mapping[str, Task]":
    from kvgauge.running.demo_tasks import demo_tasks
    from simquant.tasks import TASKS
    from simquant.tasks.longbench.tasks import longbench_tasks

    own = demo_tasks() if args.model == DEMO else TASKS
    return own if args.task_prompts is None else {**own, **longbench_tasks(args.task_prompts)}


def _options(args: argparse.Namespace, names: Sequence[str], loaded: "LoadedModel") -> "TaskOptions":
    from simquant.tasks import TaskOptions

    return TaskOptions(
        count_tokens=lambda text: len(loaded.encode(text)),
        context_tokens=loaded.context,
        limit=args.task_limit,
        seed=args.seed,
        lengths=args.task_lengths,
        depths=args.task_depths,
        data=args.task_data,
        texts=_texts(args, loaded) if "drift" in names else (),
    )


def _texts(args: argparse.Namespace, loaded: "LoadedModel") -> tuple[str, ...]:
    """Windows of the first evaluation text, short enough to be gone on with."""
    from calib.text.windows import split_windows
    from simquant.tasks.drift import Drift

    limit, room = args.task_limit or Drift.n_items, loaded.context - Drift.max_new_tokens
    n_tokens = args.task_lengths[0] if args.task_lengths else max(2, min(_DRIFT_TOKENS, room))
    corpus = loaded.corpus(args.dataset.split(",")[0], "evaluation", args.field)
    windows = split_windows(corpus, seqlen=n_tokens, limit=limit)
    return tuple(loaded.tokenizer.decode(window, skip_special_tokens=True) for window in windows)


@contextmanager
def _predictions_file(path: Path | None) -> Iterator[Path]:
    """The file that was named, or one that goes away."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "predictions.jsonl"
