"""Pages hold what docs/results/ says, what differs is found, and figures come from the commands beside them."""

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from kvgauge.cli import ablate, calibrate, compare, demo, evaluate
from kvgauge.terminal.console import UsageError
from scripts.results import __main__ as program
from scripts.results import run as running
from scripts.results.blocks import filled_page, first_difference
from scripts.results.check import problems
from scripts.results.kinds import KINDS
from scripts.results.plots import pareto_svg
from scripts.results.record import hoisted, now, record, remeasured
from scripts.results.run import CHECKOUT, SHARED, measured, moved, run_command
from scripts.results.schema import Results, ResultsError, load, load_all, numbers, to_text
from scripts.results.tables import broken

CONDITIONS = {"machine": "a machine", "versions": "some", "model": "demo", "text": "its own"}
ROW = {
    "name": "--abits 4",
    "figures": {"loss_nats": 0.25, "loss_nats_stderr": 0.01, "bits": {"key": 4.0, "value": 4.5}},
}
FILE = {
    "title": "A table",
    "kind": "evaluated",
    "commands": ["evaluate {row}"],
    "conditions": CONDITIONS,
    "rows": [ROW],
}
PAGE = "before\n<!-- results: table -->\n<!-- /results -->\nafter\n"


def results(**changes: Any) -> Results:
    return Results.model_validate({**FILE, **changes})


@pytest.fixture
def found() -> dict[str, Results]:
    return {"table": results()}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One page and one file, rendered."""
    monkeypatch.setattr("scripts.results.check.PLOTS", {})
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "table.json").write_text(to_text(results()))
    (tmp_path / "README.md").write_text("nothing\n")
    (tmp_path / "docs" / "page.md").write_text(filled_page(PAGE, {"table": results()}))
    return tmp_path


# --- this checkout


def test_every_page_of_this_checkout_holds_what_its_results_say() -> None:
    assert problems(CHECKOUT) == []


def test_every_command_is_one_that_its_program_takes() -> None:
    programs = {"calibrate": calibrate, "evaluate": evaluate, "demo": demo, "compare": compare, "ablate": ablate}
    every = load_all()
    commands = {
        command.replace("{row}", row.name)
        for one in every.values()
        for row in one.rows
        for command in one.commands_of(row)
    }
    for words in map(shlex.split, sorted(commands)):
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None
        else:
            name, *options = words[words[0] == "kvgauge" :]
            programs[name].parser().parse_args(options)


def test_every_figure_stands_where_its_kind_looks() -> None:
    for name, one in load_all().items():
        fields = {path for column in KINDS[one.kind].columns for path, _ in column.fields()}
        strange = {path for row in one.rows for path, _ in numbers(row.figures)} - fields
        assert not strange, name


# --- files


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"commands": []}, "row '--abits 4' has no command"),
        ({"conditions": None}, "row '--abits 4' has no conditions"),
        ({"conditions": {**CONDITIONS, "machine": " "}}, "machine must not be empty"),
        ({"rows": [ROW, ROW]}, "two rows are called '--abits 4'"),
        ({"rows": [{**ROW, "figures": {"loss_nats": float("nan")}}]}, "figures must be finite"),
        ({"kind": "guessed"}, "kind"),
    ],
)
def test_a_file_that_hides_something_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps({**FILE, **changes}))
    with pytest.raises(ResultsError, match=rf"(?s)table\.json: .*{said}"):
        load(tmp_path / "table.json")


def test_rows_are_added_and_take_the_place_of_older_ones(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    for ours, names in ((1.0, "ab"), (2.0, "bc")):
        record(file, "benchmark", "T", [f"bench {ours}"], now("demo", "none"), {name: {"ours": ours} for name in names})
    kept = load(file)
    assert [(row.name, row.figures["ours"]) for row in kept.rows] == [("a", 1.0), ("b", 2.0), ("c", 2.0)]
    assert [kept.commands_of(row) for row in kept.rows] == [("bench 1.0",), ("bench 2.0",), ("bench 2.0",)]


def test_what_all_rows_share_is_written_once_and_read_back_alike() -> None:
    own = {**ROW, "name": "--abits 3", "commands": ["evaluate {row}"], "conditions": CONDITIONS}
    kept = hoisted(results(rows=[ROW, own]))
    assert [row.commands for row in kept.rows] == [None, None]
    assert Results.model_validate_json(to_text(kept)) == kept


# --- pages


def test_rendering_twice_is_rendering_once(found: dict[str, Results]) -> None:
    once = filled_page(PAGE, found)
    assert "| `--abits 4` | 0.2500 ± 0.0100 | 4.00 / 4.50 |" in once
    assert "evaluate FLAGS" in once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert filled_page(once, found) == once
    assert first_difference(once, found) is None


def test_a_figure_within_a_line(found: dict[str, Results]) -> None:
    line = "It costs <!-- results: table/--abits 4/loss_nats:.2f -->9.99<!-- /results --> nats.\n"
    assert filled_page(line, found) == line.replace("9.99", "0.25")


def test_a_page_that_differs_is_found_with_its_line(checkout: Path) -> None:
    assert problems(checkout) == []
    page = checkout / "docs" / "page.md"
    number = next(n for n, line in enumerate(page.read_text().splitlines(), 1) if "0.2500" in line)
    page.write_text(page.read_text().replace("0.2500", "0.2400"))
    [said] = problems(checkout)
    assert said.startswith(f"docs/page.md: line {number}, block table: expected '| `--abits 4` | 0.2500")
    assert "0.2400" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tables", r"there is no docs/results/tables\.json; known are demo, headline, smollm2, table"),
        ("table/--abits 5/loss_nats", "no row is called '--abits 5'; there are --abits 4"),
        ("table/--abits 4/loss", "row '--abits 4' has no figure 'loss'"),
        ("table/--abits 4/bits:.2f", "cannot be written as '.2f'"),
    ],
)
def test_a_block_that_stands_for_nothing_is_named(name: str, said: str, found: dict[str, Results]) -> None:
    with pytest.raises(ResultsError, match=said):
        filled_page(f"<!-- results: {name} --><!-- /results -->", found)


@pytest.mark.parametrize(
    "page", [PAGE.replace("<!-- /results -->\n", ""), PAGE.replace("<!-- /results -->\n", "") + PAGE]
)
def test_a_block_without_an_end_is_named(page: str, found: dict[str, Results]) -> None:
    with pytest.raises(ResultsError, match="block table has no end"):
        filled_page(page, found)


def test_results_that_no_page_shows_are_named(checkout: Path) -> None:
    (checkout / "docs" / "page.md").write_text("no block\n")
    assert problems(checkout) == ["docs/results/table.json: no page shows it"]


def test_a_file_that_cannot_be_read_is_named(checkout: Path) -> None:
    (checkout / "docs" / "results" / "table.json").write_text("{}")
    assert [said.partition(": ")[0] for said in problems(checkout)] == ["table.json"]


def test_the_same_results_draw_the_same_bytes_and_others_do_not(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"name": f"r{n}", "figures": {"bits": {"average": n}, "loss_nats": 1 / n, "loss_nats_stderr": 0.01}}
        for n in (2, 3)
    ]
    kept = results(kind="compared", figures={"perplexity": 3.5}, rows=rows)
    drawn = pareto_svg(kept)
    assert pareto_svg(kept) == drawn
    assert pareto_svg(results(kind="compared", figures={"perplexity": 3.6}, rows=rows)) != drawn
    monkeypatch.setattr("scripts.results.check.PLOTS", {"p.svg": "table"})
    (checkout / "docs" / "results" / "table.json").write_text(to_text(kept))
    (checkout / "docs" / "page.md").write_text(filled_page(PAGE, {"table": kept}))
    assert problems(checkout) == ["docs/p.svg: not as docs/results/table.json draws it"]
    (checkout / "docs" / "p.svg").write_bytes(drawn)
    assert problems(checkout) == []
    monkeypatch.setattr("scripts.results.check.PLOTS", {"p.svg": "tabel"})
    assert problems(checkout) == ["docs/p.svg: there is no docs/results/tabel.json to draw it from"]


def test_a_long_command_is_the_same_to_a_shell() -> None:
    command = "kvgauge compare --nsamples 16 --recipes " + ",".join(f"predictive-{n}.yaml" for n in range(30))
    lines = broken(command)
    assert max(map(len, lines.splitlines())) <= 100
    assert lines.replace("\\\n", "") == command  # as a shell joins lines


# --- commands


def test_figures_are_read_from_what_the_programs_write() -> None:
    printed = {"loss_nats": 0.25, "bits": {"key": 4.0, "value": 4.5, "amortised": {}}, "seconds": 3.0}
    assert KINDS["evaluated"].read(printed, "--abits 4") == {
        "--abits 4": {"loss_nats": 0.25, "bits": {"key": 4.0, "value": 4.5}}
    }
    compared = {"recipes": [{"name": "kivi-2", "causal": False, "worst": {"logits": 0.1}, "sites": {}}]}
    assert KINDS["compared"].read(compared, "") == {"kivi-2": {"causal": False, "worst": {"logits": 0.1}}}
    assert KINDS["tasks"].read({"tasks": {"passkey": {"fp": 1.0, "items": 40}}}, "") == {"passkey": {"fp": 1.0}}


def test_seconds_and_published_figures_may_move() -> None:
    one = results(kind="compared", rows=[{"name": "kivi-2", "figures": {"fit_seconds": 1.0, "kl_mean": 0.1}}])
    assert list(moved(one, {"kivi-2": {"fit_seconds": 9.0, "kl_mean": 0.1}})) == []


def test_figures_that_moved_beyond_rounding_are_told() -> None:
    now_found = {"--abits 4": {"loss_nats": 0.2512, "loss_nats_stderr": 0.0101, "bits": {"key": 4.2}}}
    assert list(moved(results(), now_found)) == [
        "--abits 4: bits.key was 4; now 4.2; allowed are ±0.02",
        "--abits 4: bits.value was 4.5; now there is none",
    ]


def test_a_row_that_is_no_longer_measured_is_not_written_over() -> None:
    with pytest.raises(ResultsError, match="expected figures for --abits 4; the commands gave none"):
        remeasured(results(), {SHARED: {}}, {})


def test_figures_of_a_command_that_was_run_by_hand_are_those_of_the_same_command(tmp_path: Path) -> None:
    one = results(kind="compared", commands=["kvgauge compare --limit 2"], rows=[{"name": "kivi-2", "figures": {}}])
    file = tmp_path / "results.json"
    by_hand = {"perplexity": 3.5, "recipes": [{"name": "kivi-2", "kl_mean": 0.1}]}
    file.write_text(json.dumps({**by_hand, "command": "kvgauge compare --limit 2 --output runs/mine"}))
    figures, written = running.read(one, file)
    assert figures == {"kivi-2": {"kl_mean": 0.1}, SHARED: {"perplexity": 3.5}}
    assert written["recipes"] == by_hand["recipes"]
    file.write_text(json.dumps({**by_hand, "command": "kvgauge compare --limit 3"}))
    with pytest.raises(UsageError, match="got that of `kvgauge compare --limit 3`"):
        running.read(one, file)
    with pytest.raises(UsageError, match="cannot read it"):
        running.read(one, tmp_path / "none.json")


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that were run; each prints the figures of a row."""
    commands: list[str] = []

    def pretend(command: str, folder: Path) -> str:
        commands.append(command)
        assert (folder / "mine.yaml").read_text() == "name: mine"
        return json.dumps({**ROW["figures"], "loss_nats": 0.5, "fp": {"perplexity": 3.0}})

    monkeypatch.setattr(running, "run_command", pretend)
    return commands


def test_commands_of_a_row_run_with_its_name_and_their_files(printed: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("that of the data, which must stay")
    one = results(commands=["calibrate {row}", "evaluate q"], files={"mine.yaml": "name: mine"})
    figures = measured(one, tmp_path)
    assert printed == ["calibrate --abits 4", "evaluate q --json"]
    assert (tmp_path / "mine.yaml").read_text() == "that of the data, which must stay"
    assert figures[SHARED] == {"fp": {"perplexity": 3.0}}
    assert [line.split(";")[0] for line in moved(one, figures)] == ["--abits 4: loss_nats was 0.25"]
    written = Results.model_validate_json(remeasured(one, figures, {}))
    assert written.rows[0].figures["loss_nats"] == 0.5
    assert written.conditions is not None
    assert written.conditions.machine == now("demo", "its own").machine
    elsewhere = Results.model_validate_json(remeasured(one, figures, {"machine": "another", "versions": "others"}))
    assert elsewhere.conditions is not None
    assert (elsewhere.conditions.machine, elsewhere.conditions.versions) == ("another", "others")


def test_commands_are_run_as_they_are_typed(tmp_path: Path) -> None:
    assert "inspect" in run_command("artifact --help", tmp_path)
    with pytest.raises(UsageError, match="`kvgauge compere` ended with status 2"):
        run_command("kvgauge compere", tmp_path)


def test_the_program_renders_checks_and_tells_what_is_skipped(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], printed: list[str]
) -> None:
    monkeypatch.setattr("scripts.results.plots.PLOTS", {})
    monkeypatch.setenv("KVGAUGE_SHARED", str(checkout / "nowhere"))
    folder = checkout / "docs" / "results"
    changes: dict[str, Any] = {"table": {"files": {"mine.yaml": "name: mine"}}, "slow": {"needs": ["hours"]}}
    for name, own in {**changes, "elsewhere": {"needs": ["shared"]}}.items():
        (folder / f"{name}.json").write_text(to_text(results(**own)))
    for command, status in (("check", 1), ("render", 0), ("run", 1)):
        assert program.main(["--checkout", str(checkout), command]) == status
    out = capsys.readouterr().out
    assert "docs/page.md: line" in out
    assert "docs/results/slow.json: no page shows it" in out
    assert "mine.yaml" in (checkout / "docs" / "page.md").read_text()
    assert "moved    table: 1 rows" in out
    assert "loss_nats was 0.25; now 0.5" in out
    assert "skipped  slow: needs hours; name it to run it" in out
    assert "skipped  elsewhere: needs the data folder; set KVGAUGE_SHARED" in out
    assert program.main(["--checkout", str(checkout), "run", "table", "--write"]) == 1
    assert load(folder / "table.json").rows[0].figures["loss_nats"] == 0.5
    assert program.main(["--checkout", str(checkout), "run", "tabel"]) == 2
