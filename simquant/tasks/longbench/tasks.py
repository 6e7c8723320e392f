"""The tasks of LongBench, from the table beside this file."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from simquant.tasks.errors import TaskError
from simquant.tasks.longbench.longbench import LongBench

_TABLE = Path(__file__).with_name("longbench.yaml")


def longbench_tasks(prompts: Path | None = None) -> dict[str, LongBench]:
    """All tasks by name: those of LongBench, then those of LongBench-E.

    Parameters
    ----------
    prompts : Path or None
        A `.yaml` or `.json` file that maps data sets (`hotpotqa`) to other templates, such as the published ones.

    Raises
    ------
    TaskError
        If it cannot be read, names a data set that there is not, or a template lacks `{context}`.
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
    """The names of the tasks that `longbench` or `longbench-e` stands for.

    Parameters
    ----------
    group : str
        One of the two.
    data : Path or None
        Local data, of which a task needs its file; None is the hub, which has all.

    Raises
    ------
    TaskError
        If the data is for none of them.
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
            raise TaskError(f"{path}, {dataset}: expected a template that holds {{context}}; got {template!r:.80}.")
    return templates


def _load(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{path}: expected a .yaml file in UTF-8; got {error}. Check the path.") from error
    if not isinstance(found, dict):
        raise TaskError(f"{path}: expected data sets with their templates; got {found!r:.80}.")
    return found
