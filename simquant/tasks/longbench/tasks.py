"""Tasks of LongBench, from `longbench.yaml`."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from simquant.tasks.errors import TaskError
from simquant.tasks.longbench.longbench import LongBench

_TABLE = Path(__file__).with_name("longbench.yaml")


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
