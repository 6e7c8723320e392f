"""LongBench: its table of tasks, its local data, and scores that need no model."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from simquant.tasks import TASKS, Item, TaskError, TaskOptions
from simquant.tasks.longbench.tasks import LongBench, longbench_group, longbench_tasks

pytestmark = pytest.mark.shapes

# Of the paper's table 1, and of the extended sets.
ENGLISH = [
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
]
CHINESE = ["multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"]
EXTENDED = set(ENGLISH) - {"narrativeqa", "musique", "qmsum"}

ROW = {
    "input": "Who wrote it?",
    "context": "A long {input} text.",
    "answers": ["Ann", "Ann Lee"],
    "length": 3999,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}


def options(data: Path | None, **changes: Any) -> TaskOptions:
    return TaskOptions(count_tokens=len, context_tokens=1024, data=data, **changes)


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def item(task: str, answers: list[str], classes: list[str] | None = None) -> Item:
    return Item(
        task=task, id="0", prompt="?", references=tuple(answers), choices=tuple(classes or ()), max_new_tokens=1
    )


def test_the_tasks_are_those_of_the_paper_in_both_sets() -> None:
    tasks = longbench_tasks()
    plain = {f"longbench:{name}" for name in (*ENGLISH, *CHINESE)}
    assert tasks.keys() == plain | {f"longbench-e:{name}" for name in EXTENDED}
    assert all(task.name == name for name, task in tasks.items())
    assert {task.dataset for task in tasks.values() if task.language == "zh"} == set(CHINESE)
    assert tasks.items() <= TASKS.items(), "they can be asked for by name"


@pytest.mark.parametrize("task", longbench_tasks().values(), ids=lambda task: task.name)
def test_every_task_gives_a_right_answer_one_and_a_wrong_one_less(task: LongBench, tmp_path: Path) -> None:
    number = task.metric == "number_match"
    row = ROW | {"answers": ["Paragraph 7" if number else "北京 Paris"], "all_classes": ["北京 Paris", "Rome"]}
    del row["dataset"]
    [asked] = task.items(options(write(tmp_path / task.file_name, row)))
    assert task.score(asked.references[0], asked) == 1
    assert task.score("8" if number else "Rome", asked) < 1
    assert asked.task == task.name
    assert asked.overlong == "cut_middle"
    assert asked.max_new_tokens in (32, 64, 128, 512)


@pytest.mark.parametrize("task", longbench_tasks().values(), ids=lambda task: task.name)
def test_a_prompt_holds_the_context_once_and_the_input_at_most_once(task: LongBench) -> None:
    fields = re.findall(r"\{(\w*)\}", task.prompt)
    assert fields in (["context"], ["context", "input"])
    assert task.prompt == task.prompt.strip()


def test_an_item_is_what_its_row_says(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"_id": "1", "length": 4000}, ROW | {"_id": "2", "length": 8000}]
    task = TASKS["longbench:hotpotqa"]
    write(tmp_path / "hotpotqa.jsonl", *rows)
    first, *others = task.items(options(tmp_path))
    assert "A long {input} text." in first.prompt, "braces of the text are no fields"
    assert first.prompt.count("Who wrote it?") == 1
    assert first.references == ("Ann", "Ann Lee")
    assert [each.cell for each in (first, *others)] == [{"words": label} for label in ("0-4k", "4-8k", "8k+")]
    assert [each.id for each in task.items(options(tmp_path, limit=2))] == ["0", "1"]
    assert task.items(options(tmp_path / "hotpotqa.jsonl")) == [first, *others]


def test_the_extended_set_has_files_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", ROW)
    write(tmp_path / "hotpotqa_e.jsonl", ROW | {"_id": "e"})
    assert [each.id for each in TASKS["longbench-e:hotpotqa"].items(options(tmp_path))] == ["e"]


def test_a_group_is_all_tasks_or_those_with_local_data(tmp_path: Path) -> None:
    assert longbench_group("longbench") == tuple(f"longbench:{name}" for name in (*ENGLISH, *CHINESE))
    assert len(longbench_group("longbench-e")) == len(EXTENDED)
    write(tmp_path / "trec.jsonl", ROW)
    write(tmp_path / "lcc_e.jsonl", ROW)
    assert longbench_group("longbench", tmp_path) == ("longbench:trec",)
    assert longbench_group("longbench-e", tmp_path) == ("longbench-e:lcc",)
    with pytest.raises(TaskError, match=r"longbench: expected files such as narrativeqa.jsonl in --task-data"):
        longbench_group("longbench", tmp_path / "trec.jsonl")


@pytest.mark.parametrize("dataset", ["trec", "triviaqa", "samsum", "lsht"])
def test_only_the_first_line_of_an_answer_counts_where_examples_came_before(dataset: str) -> None:
    task = TASKS[f"longbench:{dataset}"]
    asked = item(task.name, ["City"], ["City", "Sport"])
    assert task.score("\n City\nQuestion: which?\nType: Sport", asked) == 1
    assert task.score("Sport\nCity", asked) == 0


def test_the_nearest_reference_counts() -> None:
    asked = item("longbench:hotpotqa", ["Ann", "Ann Lee"])
    assert TASKS["longbench:hotpotqa"].score("the Ann Lee.", asked) == 1


def test_without_a_network_the_error_says_how_to_use_local_data() -> None:
    with pytest.raises(TaskError, match=r"expected the data set on the hub or in its cache.*--task-data FOLDER"):
        TASKS["longbench:hotpotqa"].items(options(None))


def test_without_local_data_the_rows_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(repository: str, config: str, split: str) -> datasets.Dataset:
        asked.append((config, split))
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [item] = TASKS["longbench-e:hotpotqa"].items(options(None))
    assert asked == [("hotpotqa_e", "test")]
    assert item.references == ("Ann", "Ann Lee")


WITHOUT_INPUT = {name: value for name, value in ROW.items() if name != "input"}


@pytest.mark.parametrize(
    ("dataset", "lines", "message"),
    [
        ("hotpotqa", [], "expected one JSON object per line; got an empty file"),
        ("hotpotqa", [ROW, '{"input": '], "line 2: expected a JSON object"),
        ("hotpotqa", [ROW, "", ROW], "line 2: expected a JSON object; got an empty line"),
        ("hotpotqa", [WITHOUT_INPUT], "line 1: expected the field 'input'"),
        ("hotpotqa", [ROW, ROW | {"_id": "1", "length": "long"}], "line 2: expected the field 'length'"),
        ("hotpotqa", [ROW | {"answers": []}], "line 1: expected answers"),
        ("hotpotqa", [ROW | {"answers": [7]}], "line 1: expected answers"),
        ("hotpotqa", [ROW, ROW], "line 2: expected each _id once; got 0 again"),
        ("trec", [ROW], "line 1: expected rows of trec; got one of hotpotqa"),
        ("trec", [ROW | {"dataset": "trec"}], "line 1: expected all_classes"),
        ("passage_count", [ROW | {"dataset": "passage_count"}], "line 1: expected a number in each answer"),
    ],
)
def test_broken_data_is_refused_with_its_file_and_line(
    tmp_path: Path, dataset: str, lines: list[Any], message: str
) -> None:
    path = write(tmp_path / f"{dataset}.jsonl", *lines)
    with pytest.raises(TaskError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        TASKS[f"longbench:{dataset}"].items(options(tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"qmsum.jsonl: expected a .jsonl file"):
        TASKS["longbench:qmsum"].items(options(tmp_path))


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_other_templates_replace_the_prompts_of_both_sets(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_text(json.dumps({"hotpotqa": "{context} Q: {input}\nA:"}))
    tasks = longbench_tasks(path)
    [asked] = tasks["longbench:hotpotqa"].items(options(write(tmp_path / "hotpotqa.jsonl", ROW)))
    assert asked.prompt == "A long {input} text. Q: Who wrote it?\nA:"
    assert tasks["longbench-e:hotpotqa"].prompt == tasks["longbench:hotpotqa"].prompt
    assert tasks["longbench:trec"] == longbench_tasks()["longbench:trec"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hotpotq: '{context}'", "got 'hotpotq'. Did you mean hotpotqa?"),
        ("zzz: '{context}'", "got 'zzz'. They are narrativeqa, "),
        ("hotpotqa: 'Q: {input}'", "hotpotqa: expected a template with {context}"),
        ("hotpotqa: 7", "hotpotqa: expected a template with {context}; got 7"),
        ("- hotpotqa", "expected a mapping from data sets to templates"),
        ("a: [", "expected a .yaml file in UTF-8"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(content)
    with pytest.raises(TaskError, match=re.escape(message)):
        longbench_tasks(path)


def test_templates_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none.yaml: expected a .yaml file"):
        longbench_tasks(tmp_path / "none.yaml")
