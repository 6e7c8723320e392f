"""Sweeps and searches: figures against the programs, restarts, errors with their lines, and what is held out."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.programs import prose, save_model, save_tokenizer

from calib.recipe.recipe import load_recipe
from calib.text.corpus import load_corpus
from calib.text.windows import split_windows
from kvgauge.cli import calibrate as calibrate_program
from kvgauge.cli import evaluate as evaluate_program
from kvgauge.cli import sweep as sweep_program
from kvgauge.sweeping import run as sweep_run
from kvgauge.sweeping import workers as sweep_workers
from kvgauge.sweeping.cell import Cell, readable
from kvgauge.sweeping.gathering import Gathering
from kvgauge.sweeping.grid import GridError, load_grid
from kvgauge.sweeping.search.samplers import OptunaSampler, RandomSampler, Score
from kvgauge.sweeping.search.space import Parameter, Search
from kvgauge.sweeping.settings import Settings
from kvgauge.sweeping.tasks import Bench
from kvgauge.sweeping.workers import Workers

SETTINGS = """\
models: [model]
dataset: b.txt
calibration_dataset: a.txt
nsamples: 2
seqlen: 32
limit: 3
"""
RECIPES = "recipes: [kvquant, {recipe: kvquant, name: narrow, set: {key.bits: 2}}]\n"
SEARCH = """\
search:
  recipe: kvquant
  budget_bits: 5
  parameters: {key.bits: [2, 3, 4], value.bits: {low: 2, high: 6}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes, two texts, and a recipe that goes with no model."""
    path = tmp_path_factory.mktemp("sweep")
    save_model(path / "model")
    save_tokenizer(path / "model")
    for seed, name in enumerate(("a.txt", "b.txt")):
        (path / name).write_text(prose(seed, 100))
    grid = "{method: uniform, bits: 4, per: token}"
    (path / "nowhere.yaml").write_text(f"include: [layers.9.*]\nkey: {grid}\nvalue: {grid}\n")
    return path


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one test, with the texts and the model in it."""
    for name in ("model", "a.txt", "b.txt", "nowhere.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """What a sweep over RECIPES has left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert sweep(RECIPES) == 0
    return folder / "out"


@pytest.fixture
def swept(here: Path, finished: Path) -> None:
    """The folder of one test, after that sweep."""
    shutil.copytree(finished, "out")


def write_grid(text: str, settings: str = SETTINGS) -> Path:
    Path("grid.yaml").write_text(settings + text)
    return Path("grid.yaml")


def sweep(text: str, *options: str, settings: str = SETTINGS) -> int:
    return sweep_program.main([str(write_grid(text, settings)), "--output", "out", *options])


def summary() -> dict[str, Any]:
    return json.loads(Path("out/summary.json").read_text())


def cells() -> dict[str, int]:
    """The files of finished cells, with the times at which they were written."""
    return {path.name: path.stat().st_mtime_ns for path in Path("out/cells").glob("*.json")}


def forbid(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def stop(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(owner, name, stop)


# --- figures


def test_a_cell_is_what_calibrate_and_evaluate_find(swept: None, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["model", "--seqlen", "32"]
    where = ["--quantizer-path", "q.safetensors"]
    flags = ["--recipe", "kvquant", "--key-bits", "2", "--dataset", "a.txt", "--nsamples", "2"]
    assert calibrate_program.main([*model, *where, *flags]) == 0
    capsys.readouterr()
    assert evaluate_program.main([*model, *where, "--dataset", "b.txt", "--limit", "3", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    [row] = [row for row in summary()["cells"] if row["recipe"] == "narrow"]
    kept = json.loads((Path("out") / row["file"]).read_text())["result"]
    assert {**kept, "seconds": 0} == {**alone, "seconds": 0}
    assert (row["value"], row["stderr"], row["n"]) == (alone["loss_nats"], alone["loss_nats_stderr"], 3 * 31)
    assert (row["bits"], row["key_bits"]) == (alone["bits"]["average"], alone["bits"]["key"])


def test_the_summary_is_written_in_all_its_forms(swept: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(RECIPES) == 0
    found = summary()
    assert [row["recipe"] for row in found["cells"]] == ["narrow", "kvquant"]
    assert found["cells"][0]["bits"] < found["cells"][1]["bits"]
    with Path("out/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [row["value"] for row in found["cells"]]
    assert "| narrow " in capsys.readouterr().out
    assert Path("out/pareto-model.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("out").rglob("*.tmp"))


def test_statistics_are_gathered_once_for_all_cells(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, gather = [], Gathering.gather
    monkeypatch.setattr(Gathering, "gather", lambda self: (stages.append(self.stage), gather(self))[1])
    assert sweep("recipes: [kvquant, int8-per-channel, {recipe: kvquant, set: {sink_tokens: 1}}]\n") == 0
    assert sorted(stages) == ["post_rope", "pre_rope"]


def test_tasks_are_cells_too_and_keep_their_answers(here: Path) -> None:
    settings = "models: [demo]\nnsamples: 1\nseqlen: 64\nlimit: 1\ntask_limit: 1\ntask_lengths: [30]\n"
    assert sweep("recipes: [kvquant-2]\ntasks: [perplexity, passkey]\n", settings=settings) == 0
    by_task = {row["task"]: row for row in summary()["cells"]}
    assert by_task["passkey"]["n"] == 1
    assert by_task["passkey"]["value"] == by_task["passkey"]["quantized"] - by_task["passkey"]["fp"]
    assert by_task["passkey"]["bits"] == by_task["perplexity"]["bits"]
    [answers] = Path("out/cells").glob("*passkey*.jsonl")
    assert len(answers.read_text().splitlines()) == 2


# --- restarts


def test_finished_cells_are_not_run_again(swept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before, figures = cells(), summary()
    forbid(monkeypatch, Gathering, "gather")
    forbid(monkeypatch, sweep_run, "fit")
    assert sweep(RECIPES) == 0
    assert cells() == before
    assert summary() == {**figures, "command": summary()["command"]}


def test_a_new_cell_does_not_run_the_old_ones(swept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cells()
    forbid(monkeypatch, Gathering, "gather")
    assert sweep("recipes: [kvquant, {recipe: kvquant, set: {key.bits: 3}}]\n") == 0
    assert len(cells()) == 3
    assert before.items() <= cells().items()


def test_other_text_under_the_same_name_makes_another_cell(swept: None) -> None:
    Path("b.txt").unlink()
    Path("b.txt").write_text(prose(5, 101))
    assert sweep("recipes: [kvquant]\n") == 0
    assert len(cells()) == 3


def test_a_failed_cell_stops_no_other_and_is_tried_again(
    swept: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "recipes: [nowhere.yaml, kvquant, {recipe: kvquant, set: {key.bits: 3}}]\n"
    assert sweep(text) == 1
    assert [row["recipe"] for row in summary()["cells"]] == ["kvquant key.bits=3", "kvquant"]
    [failed] = summary()["failed"]
    assert (failed["recipe"], failed["task"]) == ("nowhere", "perplexity")
    assert "layers.9" in failed["error"]
    assert failed["error"] in capsys.readouterr().out
    before = cells()
    tried = []
    monkeypatch.setattr(sweep_run, "_fitted", lambda *_: tried.append(1) or 1 / 0)
    assert sweep(text) == 1
    assert (cells(), tried) == (before, [1])
    assert "ZeroDivisionError" in summary()["failed"][0]["error"]


def test_a_model_that_cannot_be_had_fails_its_own_cells_only(swept: None) -> None:
    assert sweep("recipes: [kvquant]\n", settings=SETTINGS.replace("[model]", "[./gone, model]")) == 1
    assert [row["model"] for row in summary()["cells"]] == ["model"]
    assert "./gone: no such file or folder" in summary()["failed"][0]["error"]


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: text.replace("0.", "1.", 1), lambda _: ""])
def test_a_damaged_cell_is_done_again(swept: None, damage: Callable[[str], str]) -> None:
    figures = summary()["cells"]
    [path] = Path("out/cells").glob("*narrow*.json")
    path.write_text(damage(whole := path.read_text()))
    assert path.read_text() != whole
    assert sweep(RECIPES) == 0
    assert summary()["cells"] == figures


def test_damaged_statistics_are_gathered_again(swept: None, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = Path("out/statistics").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert sweep("recipes: [{recipe: kvquant, set: {key.bits: 3}}]\n") == 0
    assert "gathered again" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_a_killed_sweep_goes_on_where_it_was(here: Path) -> None:
    text = "recipes:\n" + "".join(f"  - {{recipe: kvquant, name: r{n}, set: {{key.bits: 2}}}}\n" for n in range(12))
    command = [sys.executable, "-m", "kvgauge.cli.sweep", str(write_grid(text)), "--output", "out"]
    root = Path(sweep_program.__file__).parents[2]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (Path("out/cells").is_dir() and cells()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = cells()
    assert 1 <= len(before) < 12
    assert sweep(text) == 0
    assert len(cells()) == len(summary()["cells"]) == 12
    assert before.items() <= cells().items()


# --- workers


def test_processes_find_the_same(swept: None) -> None:
    alone = summary()["cells"]
    [path] = Path("out/cells").glob("*narrow*")
    path.unlink()
    assert sweep(RECIPES, "--jobs", "2") == 0
    assert summary()["cells"] == alone


def test_a_worker_that_dies_takes_no_other_item_with_it() -> None:
    workers = Workers(jobs=2)
    with workers.started():
        errors = workers.errors(exec, ["", "import os; os._exit(1)", "raise ValueError('two')", ""], "items")
    assert errors[0] is errors[3] is None
    assert "worker died" in str(errors[1])
    assert errors[2] == "ValueError: two"


def test_a_dask_cluster_of_two_processes_finds_the_same(swept: None) -> None:
    pytest.importorskip("distributed")
    write_grid(RECIPES)
    alone = summary()["cells"]
    shutil.rmtree("out/cells")
    command = [sys.executable, "-m", "kvgauge.cli.sweep", "grid.yaml", "--output", "out", "--backend", "dask"]
    root = Path(sweep_program.__file__).parents[2]
    subprocess.run([*command, "--jobs", "2"], env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    assert summary()["cells"] == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backend dask", "pip install distributed"),
        ("--backend ray", "pip install ray"),
        ("--search 2 --sampler optuna", "pip install optuna"),
        ("--scheduler tcp://a:1", "add --backend dask"),
    ],
)
def test_what_is_not_installed_is_named_with_its_command(
    options: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = sweep_workers.importlib.util.find_spec
    missing = ("distributed", "ray", "optuna")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in missing else find(name, *a))
    assert sweep(RECIPES + SEARCH, *options.split()) == 2
    assert message in capsys.readouterr().err


# --- the file


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("recipes: [kvqant]", 1, "Did you mean kvquant?"),
        ("models: [demo]\nrecipes:\n  - {recipe: kvquant, set: {key.bit: 2}}", 3, "Did you mean bits?"),
        ("recipes:\n  - {recipe: kvquant, set: {key.bits: 9}}", 2, "got 9; use 8"),
        ("recipes:\n  - {recipe: kvquant, sets: {}}", 2, "Did you mean set?"),
        ("\ntask: [perplexity]", 2, "Did you mean tasks?"),
        ("tasks:\n  - perplexity\n  - paskey", 3, "Did you mean passkey?"),
        ("\nlimit: 0", 2, "greater than or equal to 1"),
        ("seqlen: 64\nseed: '0'", 2, "write 0"),
        ("\nprotocol: decod", 2, "Did you mean decode?"),
        ("residual_tokens: 8", 1, "use protocol: decode"),
        ("models: [a, a]", 1, "a is there twice"),
        ("recipes: [kvquant, kvquant]", 1, "kvquant is there twice"),
        ("models: []", 1, "must not be empty"),
        ("limit: 1\nlimit: 2", 2, "occurs twice"),
        ("- kvquant", 1, "expected lines"),
        ("search:\n  recipe: kvquant\n  budget_bits: 3", 1, "parameters: missing"),
        ("search: {recipe: kvquant, budget_bits: 3,\n  parameters: {key.bits: [2, 9]}}", 1, "got 9"),
        ("search: {recipe: kvquant, budget_bits: 3, parameters: {\n  key.bits: {low: 4, high: 2}}}", 2, "below high"),
        ("search: {recipe: kvquant, budget_bits: 3, parameters: {\n  key.bits: {low: 4}}}", 2, "or a range: {low"),
        (
            "search: {recipe: kvquant, budget_bits: 3, objective: los_nats, parameters: {}}",
            1,
            "Did you mean loss_nats?",
        ),
    ],
)
def test_errors_of_the_file_say_where_and_what(text: str, line: int, message: str, here: Path) -> None:
    with pytest.raises(GridError) as caught:
        load_grid(write_grid(text, settings=""))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"grid grid.yaml, line {line}: ")


def test_a_file_that_is_missing_or_names_no_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_program.main(["gone.yaml"]) == 1
    assert "gone.yaml" in capsys.readouterr().err
    assert sweep("") == 2
    assert "names no recipe" in capsys.readouterr().err


def test_groups_of_tasks_stand_for_their_members(here: Path) -> None:
    grid = load_grid(write_grid("tasks: [synthetic, perplexity]"))
    assert set(grid.single_tasks) > {"perplexity", "multi_key", "common_words"}
    assert "synthetic" not in grid.single_tasks


def test_names_of_files_tell_cells_apart_and_have_no_folders_in_them() -> None:
    recipe = load_recipe("kvquant")
    settings = [Settings(limit=1), Settings(limit=2)]
    names = {Cell(model="a/b", recipe=recipe, task="perplexity", settings=own).name for own in settings}
    assert len(names) == 2
    assert not any("/" in name for name in names)
    assert readable("../models/x y") == "models-x-y"


def test_options_of_tasks_do_not_concern_perplexity() -> None:
    recipe = load_recipe("kvquant")
    one, two = (
        {task: Cell(model="demo", recipe=recipe, task=task, settings=own).name for task in ("perplexity", "passkey")}
        for own in (Settings(), Settings(task_limit=3))
    )
    assert one["perplexity"] == two["perplexity"]
    assert one["passkey"] != two["passkey"]


# --- search


PARAMETERS = {
    "a": Parameter(choices=[2, 3, 4]),
    "b": Parameter(low=1, high=6),
    "c": Parameter(low=0.0, high=0.02),
    "d": Parameter(low=1e-4, high=1.0, log=True),
}


def in_range(values: Mapping[str, Any]) -> bool:
    whole = values["a"] in (2, 3, 4) and values["b"] in range(1, 7) and type(values["b"]) is int
    return whole and 0 <= values["c"] <= 0.02 and 1e-4 <= values["d"] <= 1


def test_random_trials_are_in_range_reach_the_ends_and_do_not_depend_on_how_many() -> None:
    found = RandomSampler(PARAMETERS, seed=3).ask(60)
    assert all(map(in_range, found))
    assert {values["b"] for values in found} == set(range(1, 7))
    assert sum(values["d"] < 0.01 for values in found) > 15  # evenly by the logarithm: half of them
    again = RandomSampler(PARAMETERS, seed=3)
    assert again.ask(20) + again.ask(40) == found
    assert RandomSampler(PARAMETERS, seed=4).ask(60) != found


def test_a_small_space_is_tried_whole_and_nothing_twice() -> None:
    small = {"a": Parameter(choices=[2, 3]), "b": Parameter(low=1, high=3)}
    sampler = RandomSampler(small, seed=0)
    found = sampler.ask(50)
    wanted = {(a, b) for a, b in itertools.product([2, 3], [1, 2, 3])}
    assert {(values["a"], values["b"]) for values in found} == wanted
    assert len(found) == 6
    assert sampler.ask(5) == []


def test_optuna_learns_and_stays_within_the_budget() -> None:
    pytest.importorskip("optuna")
    sampler, asked = OptunaSampler(PARAMETERS, seed=0, at_once=2), []
    while len(asked) < 40:
        values = sampler.ask(40 - len(asked))
        assert len(values) == 2
        asked += values
        sampler.tell([Score(v["c"], v["b"] - 3.5) if v["a"] > 2 else None for v in values])
    assert all(map(in_range, asked))
    late = asked[20:]
    assert sum(v["b"] <= 3 for v in late) > 12
    assert sum(v["c"] for v in late) / 20 < 0.007


def test_a_search_finds_the_least_within_the_budget_and_scores_it_elsewhere(here: Path) -> None:
    assert sweep(SEARCH, "--search", "6") == 0
    found = json.loads(Path("out/search.json").read_text())
    assert len(found["trials"]) == 7
    assert found["trials"][0]["values"] == {}
    within = [t["result"] for t in found["trials"] if t["result"]["bits"]["average"] <= 5]
    assert 0 < len(within) < 7
    assert [t["within_budget"] for t in found["trials"]].count(True) == len(within)
    best = min(result["loss_nats"] for result in within)
    assert found["best"]["result"]["loss_nats"] == best
    assert any(t["result"]["loss_nats"] < best for t in found["trials"] if not t["within_budget"])
    assert found["held_out"]["best"]["values"] == found["best"]["values"]
    assert found["held_out"]["best"]["result"]["loss_nats"] != best
    recipe = load_recipe("out/best.yaml")
    assert [recipe.key.bits, recipe.value.bits] == list(found["best"]["values"].values())
    text = Path("out/search.md").read_text()
    for result in (found["best"]["result"], found["held_out"]["best"]["result"]):
        assert f"{result['loss_nats']:.5f} ± {result['loss_nats_stderr']:.5f}" in text
    assert "biased" in text


def test_what_was_tried_is_kept_for_a_longer_search(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep(SEARCH, "--search", "2") == 0
    short, before = json.loads(Path("out/search.json").read_text()), cells()
    forbid(monkeypatch, Gathering, "gather")
    assert sweep(SEARCH, "--search", "3") == 0
    longer = json.loads(Path("out/search.json").read_text())
    assert longer["trials"][:3] == short["trials"]
    assert before.items() <= cells().items()


def test_windows_that_choose_and_windows_that_report_are_disjoint(here: Path, folder: Path) -> None:
    settings = Settings(dataset="b.txt", seqlen=32, limit=3)
    source = Gathering("model", settings, "pre_rope")
    cell = {"model": "model", "recipe": load_recipe("kvquant"), "task": "perplexity", "settings": settings}
    first, later = (
        Bench(Cell(**cell, first_window=n), source.load_model(), None).windows()  # type: ignore[arg-type]
        for n in (0, 3)
    )
    text = load_corpus("b.txt", "evaluation", source.load_model().encode)
    windows = split_windows(text, seqlen=32)
    assert first.tolist() == windows[:3].tolist()
    assert later.tolist() == windows[3:6].tolist()


def test_values_that_do_not_go_together_are_a_failed_trial(here: Path) -> None:
    table = "{method: codebook, bits: 2, per: channel, tables: site}"
    Path("table.yaml").write_text(f"key: {table}\nvalue: {table}\n")
    parameters = "{key.per: [channel, token], key.tables: [site, channel]}"
    assert sweep(f"search: {{recipe: table.yaml, budget_bits: 9, parameters: {parameters}}}", "--search", "9") == 0
    found = json.loads(Path("out/search.json").read_text())["trials"]
    assert len(found) == 1 + 4
    [failed] = [trial for trial in found if trial["error"]]
    assert failed["values"] == {"key.per": "token", "key.tables": "channel"}
    assert failed["error"] in Path("out/search.md").read_text()


@pytest.mark.parametrize(
    ("settings", "text", "status", "message"),
    [
        (SETTINGS, "", 2, "the grid has no entry search"),
        (SETTINGS.replace("[model]", "[model, demo]"), SEARCH, 2, "got 2: model, demo"),
        (SETTINGS.replace("limit: 3", "limit:"), SEARCH, 2, "the grid needs limit: N"),
        (SETTINGS.replace("limit: 3", "limit: 900"), SEARCH, 1, "half of them held out; it has"),
        (SETTINGS, SEARCH.replace("budget_bits: 5", "budget_bits: 0.5"), 1, ""),
    ],
)
def test_searches_that_cannot_be(
    settings: str, text: str, status: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(text, "--search", "1", settings=settings) == status
    assert message in capsys.readouterr().err
    if not message:
        assert "Nothing is within 0.5 bits" in Path("out/search.md").read_text()
        assert not Path("out/best.yaml").exists()


def test_a_share_of_no_outliers_is_none_at_all() -> None:
    search = Search(recipe="kvquant", budget_bits=3, parameters={"key.outliers.fraction": Parameter(choices=[0, 0.02])})
    assert search.changed({"key.outliers.fraction": 0}).key.outliers is None
    assert search.changed({"key.outliers.fraction": 0.02}).key.outliers.fraction == 0.02
