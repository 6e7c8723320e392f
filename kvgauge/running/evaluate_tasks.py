"""Tasks for `evaluate`: answers of both models, and their scores."""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from calib.demo import tasks as demo
from calib.demo.draws import Draws
from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.model import DEMO
from kvgauge.terminal.console import UsageError, bar
from simquant.tasks import TASKS, Item, Prediction, Task, TaskOptions
from simquant.tasks.synthetic.grid import DEPTHS, Place, places

_WORDS = (800,)
"""Words around what has to be found: what leaves room for several numbers in the context. A word is about a token."""

_DRIFT_TOKENS = 256
"""Of a prompt of `drift`, unless --task-lengths says otherwise."""


@final
@dataclass(frozen=True, kw_only=True)
class DemoTask(Task):
    """A task with the demo model's own items.

    Parameters
    ----------
    name, metric : str
        See `Task`.
    scorer : Task
        Scores answers.
    draw : callable
        A trial from draws, words of other text, questions, and where the task has one a depth.
    has_depth : bool
        Whether it has one.
    """

    name: str
    metric: str
    scorer: Task
    draw: Callable[..., demo.Trial]
    has_depth: bool

    def items(self, options: TaskOptions) -> Sequence[Item]:
        """A trial for each length and depth in turn; lengths are words of other text."""
        depths = (options.depths or DEPTHS) if self.has_depth else (None,)
        return [
            self._item(options, place)
            for place in places(options.lengths or _WORDS, depths, options.limit or self.n_items)
        ]

    def score(self, text: str, item: Item | Prediction) -> float:
        """Scored as for other models."""
        return self.scorer.score(text, item)

    def _item(self, options: TaskOptions, place: Place) -> Item:
        at: dict[str, Any] = {} if place.depth is None else {"depth": place.depth}
        trial = self.draw(Draws(f"task {self.name} {options.seed} {place.id}"), place.length, 1, **at)
        return Item(
            task=self.name,
            id=place.id,
            prompt=trial.prompt,
            references=tuple(re.findall(r"\d+", trial.answer)) or (trial.answer.strip(" ."),),
            cell=place.cell("words"),
            max_new_tokens=options.count_tokens(trial.answer),
        )


def demo_tasks() -> Mapping[str, Task]:
    """All tasks, those among them that the demo model knows in its own words."""
    with_depth = {"passkey": demo.passkey, "needle": demo.needle}
    without = {name: demo.TASKS[name] for name in ("multi_key", "multi_value", "variables", "common_words")}
    own = {
        name: DemoTask(
            name=name, metric=TASKS[name].metric, scorer=TASKS[name], draw=draw, has_depth=name in with_depth
        )
        for name, draw in {**with_depth, **without}.items()
    }
    return {**TASKS, **own}


if TYPE_CHECKING:
    from kvgauge.loading.models import LoadedModel
    from kvgauge.running.evaluated import Evaluated
    from simquant.tasks import Task, TaskOptions, TaskResult


def run_tasks(
    config: EvaluateConfig, names: Sequence[str], loaded: "LoadedModel", evaluated: "Evaluated"
) -> "list[TaskResult]":
    """Asks both models all items of the tasks, and scores their answers; a prompt enters the cache at once by default.

    Parameters
    ----------
    config : EvaluateConfig
        Its model, text, tasks and protocol count.
    names : sequence of str
        Of tasks, without groups.
    loaded : LoadedModel
        Model and tokenizer.
    evaluated : Evaluated
        The quantizers of the cache.

    Raises
    ------
    UsageError
        If the model has no tokenizer, or the format of prompts has no effect.
    TaskError, NothingQuantizedError
        See `simquant.tasks.predict`.
    """
    from simquant.tasks import predict, score_predictions

    if loaded.tokenizer is None:
        raise UsageError(
            "--tasks: the model has no tokenizer that can be loaded; put its tokenizer files beside the weights"
        )
    tasks, options = _tasks(config), _options(config, names, loaded)
    settings = evaluated.settings(config, protocol="cache")
    items = [item for name in names for item in tasks[name].items(options)]
    if options.format not in {item.format for item in items}:
        raise UsageError(
            f"--task-format {options.format}: no effect on {', '.join(names)}, whose prompts are text to go on with; "
            "remove it"
        )
    with _predictions_file(config.tasks.predictions) as path:
        predict(
            loaded.model,
            loaded.tokenizer,
            items,
            evaluated.quantizers,
            path,
            policy=settings["policy"],
            chunking=settings["chunking"] if config.protocol.prefill_tokens or config.protocol.chunk_tokens else None,
            progress=lambda own: bar(own, "answering"),
        )
        return score_predictions(path, tasks, only={(item.task, item.id) for item in items})


def _tasks(config: EvaluateConfig) -> "Mapping[str, Task]":
    from kvgauge.running.evaluate_tasks import demo_tasks
    from simquant.tasks import TASKS
    from simquant.tasks.longbench.tasks import longbench_tasks

    own = demo_tasks() if config.model.name == DEMO else TASKS
    prompts = config.tasks.task_prompts
    return own if prompts is None else {**own, **longbench_tasks(prompts)}


def _options(config: EvaluateConfig, names: Sequence[str], loaded: "LoadedModel") -> "TaskOptions":
    from simquant.tasks import TaskOptions
    from simquant.tasks.prompt import prompt_ids

    format = config.tasks.task_format or "plain"
    return TaskOptions(
        count_tokens=lambda text: len(prompt_ids(loaded.tokenizer, text, format)),
        context_tokens=loaded.context,
        format=format,
        limit=config.tasks.task_limit,
        seed=config.text.seed,
        lengths=config.tasks.task_lengths,
        depths=config.tasks.task_depths,
        data=config.tasks.task_data,
        texts=_texts(config, loaded) if "drift" in names else (),
    )


def _texts(config: EvaluateConfig, loaded: "LoadedModel") -> tuple[str, ...]:
    """Windows of the first evaluation text, short enough to be gone on with."""
    from calib.text.windows import split_windows
    from simquant.tasks.drift import Drift

    limit, room = config.tasks.task_limit or Drift.n_items, loaded.context - Drift.max_new_tokens
    n_tokens = config.tasks.task_lengths[0] if config.tasks.task_lengths else max(2, min(_DRIFT_TOKENS, room))
    corpus = loaded.corpus(config.text.datasets[0], "evaluation", config.text.field)
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
