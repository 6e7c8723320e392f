"""LongBench: questions on long documents, with the table of its data sets and prompts in `longbench.yaml`."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import yaml

from simquant.tasks.data import Row, hub_rows, read_rows
from simquant.tasks.errors import TaskError
from simquant.tasks.item import Item
from simquant.tasks.longbench.metrics import (
    Language,
    best,
    class_match,
    edit_similarity,
    number_match,
    rouge_l,
    token_f1,
)
from simquant.tasks.options import TaskOptions
from simquant.tasks.prediction import Prediction
from simquant.tasks.task import Task

# The authors' own data set is a loading script, which datasets no longer runs; this copy of it holds tables.
_REPOSITORY = "Xnhyacinth/LongBench"

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "input": str,
    "context": str,
    "answers": list,
    "length": int,
    "all_classes": (list, type(None)),
    "_id": str,
}

_LENGTHS = ((4000, "0-4k"), (8000, "4-8k"))

_TABLE = Path(__file__).with_name("longbench.yaml")


@final
@dataclass(frozen=True, kw_only=True)
class LongBench(Task):
    """Questions of one LongBench data set; prompts that do not fit into the context are cut in the middle.

    The prompts have our own wording, so that scores compare runs of this program with each other, not with published
    tables.

    Parameters
    ----------
    name : str
        Name on the command line.
    dataset : str
        Name of the data set, such as `hotpotqa`; with the suffix `_e` that of LongBench-E, which has equally many
        short, medium and long documents.
    metric : str
        Function of `simquant.tasks.longbench.metrics`; the best score over all references counts.
    prompt : str
        Template with `{context}`, and `{input}` if the data set has one.
    max_new_tokens : int
        Maximum number of tokens of the answer.
    language : {'en', 'zh'}
        Language of the answers.
    first_line : bool
        Score only the first line of an answer.
    continues : bool
        Ask plainly whatever the format, as the authors do: the prompt is a row of examples, or code, to go on with.

    References
    ----------
    Bai et al., LongBench, arXiv:2308.14508.
    """

    name: str
    dataset: str
    metric: str
    prompt: str
    max_new_tokens: int
    language: Language = "en"
    first_line: bool = False
    continues: bool = False

    @property
    def file_name(self) -> str:
        """File name of the local data in the authors' folder."""
        return f"{self.dataset}.jsonl"

    def items(self, options: TaskOptions) -> Sequence[Item]:
        """Items in the order of the data; all of them without a limit."""
        source, rows = self._rows(options)
        items: dict[str, Item] = {}
        for number, row in enumerate(rows[: options.limit], 1):
            item = self._item(row, where := f"{source}, line {number}", options)
            if item.id in items:
                raise TaskError(f"{where}: expected each _id once; got {item.id} again. Remove one of the lines.")
            items[item.id] = item
        return list(items.values())

    def score(self, text: str, item: Item | Prediction) -> float:
        """Metric against the best-matching reference."""
        answer = text.strip().partition("\n")[0] if self.first_line else text
        return best(self._comparison(item.choices), answer, item.references)

    def _rows(self, options: TaskOptions) -> tuple[str, Sequence[Row]]:
        if options.data is None:
            return self.dataset, hub_rows(_REPOSITORY, self.dataset, "test", _FIELDS, "--task-data FOLDER")
        path = options.data / self.file_name if options.data.is_dir() else options.data
        return str(path), read_rows(path, _FIELDS)

    def _item(self, row: Row, where: str, options: TaskOptions) -> Item:
        answers, classes = row["answers"], row.get("all_classes") or []
        if str(row.get("dataset", self.dataset)).removesuffix("_e") != self.dataset.removesuffix("_e"):
            raise TaskError(f"{where}: expected rows of {self.dataset}; got one of {row['dataset']}. Use another file.")
        if not answers or not all(isinstance(text, str) for text in (*answers, *classes)):
            raise TaskError(
                f"{where}: expected answers, and all_classes if any, as lists of text; got {answers!r:.60} and "
                f"{classes!r:.60}. Correct or remove the line."
            )
        if self.metric == "class_match" and not classes:
            raise TaskError(
                f"{where}: expected all_classes, from which an answer to {self.dataset} is chosen; got none. Correct "
                "or remove the line."
            )
        if self.metric == "number_match" and not all(re.search(r"\d", text) for text in answers):
            raise TaskError(
                f"{where}: expected a number in each answer; got {answers!r:.60}. Correct or remove the line."
            )
        return Item(
            task=self.name,
            id=row["_id"],
            # Both fields in one pass: a context that contains "{input}" stays as it is.
            prompt=re.sub(r"\{(context|input)\}", lambda match: str(row[match[1]]), self.prompt),
            references=tuple(answers),
            choices=tuple(classes),
            cell={"words": next((label for bound, label in _LENGTHS if row["length"] < bound), "8k+")},
            format="plain" if self.continues else options.format,
            max_new_tokens=self.max_new_tokens,
            overlong="cut_middle",
        )

    def _comparison(self, choices: Sequence[str]) -> Callable[[str, str], float]:
        by_name: Mapping[str, Callable[..., Any]] = {
            "token_f1": partial(token_f1, language=self.language),
            "rouge_l": partial(rouge_l, language=self.language),
            "class_match": partial(class_match, classes=choices),
            "number_match": number_match,
            "edit_similarity": edit_similarity,
        }
        return by_name[self.metric]


def longbench_tasks(prompts: Path | None = None) -> dict[str, LongBench]:
    """Tasks by name: those of LongBench, then those of LongBench-E.

    Parameters
    ----------
    prompts : Path or None
        A `.yaml` or `.json` file that maps data sets (`hotpotqa`) to other templates, such as the published ones.

    Raises
    ------
    TaskError
        If the file cannot be read, names an unknown data set, or has a template without `{context}`.
    """
    table: dict[str, dict[str, Any]] = _load(_TABLE)
    for dataset, template in ({} if prompts is None else _templates(prompts, table)).items():
        table[dataset] = table[dataset] | {"prompt": template}
    plain = [_task(f"longbench:{dataset}", dataset, entry) for dataset, entry in table.items()]
    extended = [
        _task(f"longbench-e:{dataset}", f"{dataset}_e", entry)
        for dataset, entry in table.items()
        if entry.get("extended", False)
    ]
    return {task.name: task for task in (*plain, *extended)}


def longbench_group(group: str, data: Path | None = None) -> tuple[str, ...]:
    """Names of the tasks in a group.

    Parameters
    ----------
    group : str
        `longbench` or `longbench-e`.
    data : Path or None
        Folder of local data: only tasks whose file is there; None is the hub, with all tasks.

    Raises
    ------
    TaskError
        If the folder has no file of any task.
    """
    tasks = [task for task in longbench_tasks().values() if task.name.startswith(f"{group}:")]
    found = tuple(task.name for task in tasks if data is None or (data / task.file_name).exists())
    if not found:
        raise TaskError(
            f"{group}: expected files such as {tasks[0].file_name} in --task-data; {data} has none. Name their folder."
        )
    return found


def _task(name: str, dataset: str, entry: Mapping[str, Any]) -> LongBench:
    own = {key: value for key, value in entry.items() if key != "extended"}
    return LongBench(name=name, dataset=dataset, **own)


def _templates(path: Path, table: Mapping[str, object]) -> dict[str, str]:
    templates = _load(path)
    for dataset, template in templates.items():
        if dataset not in table:
            close = difflib.get_close_matches(str(dataset), table, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"They are {', '.join(table)}."
            raise TaskError(f"{path}: expected data sets of LongBench; got {dataset!r}. {advice}")
        if not isinstance(template, str) or "{context}" not in template:
            raise TaskError(
                f"{path}, {dataset}: expected a template with {{context}}; got {template!r:.80}. Add {{context}}."
            )
    return templates


def _load(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{path}: expected a .yaml file in UTF-8; got {error}. Check the path.") from error
    if not isinstance(found, dict):
        raise TaskError(f"{path}: expected a mapping from data sets to templates; got {found!r:.80}. Correct the file.")
    return found
