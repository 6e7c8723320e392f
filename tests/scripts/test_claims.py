"""The README's figures have claims, claims can be read off what commands print, and a wrong figure is found."""

import json
import re
from pathlib import Path

import pytest

from kvgauge.cli import calibrate, demo, evaluate
from kvgauge.cli import compare as compare_recipes
from scripts.claims import __main__ as claims
from scripts.claims.file import Claim, Quotation, TableClaim, load_claims
from scripts.claims.output import Output, UnreadableError
from scripts.claims.readme import readme_problems
from scripts.claims.run import Runner, run_command
from scripts.claims.tables import agree, allowance, figures, find_tables

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TABLE = "| what | ours | theirs |\n|---|---|---|\n| speed | 3.0 s | 4.0 s |\n| size | 10 KiB | 20 KiB |\n"


def table_claim(table: str = TABLE, **changes: object) -> TableClaim:
    return TableClaim(name="table", sentence="Ours and theirs.", commands=("show {row}",), table=table, **changes)


def quotation(**changes: object) -> Quotation:
    entries = {"name": "share", "sentence": "it takes 0.25 of it", "commands": ("show",), "figure": "0.25"}
    return Quotation(**{**entries, "read": "[share]", **changes})


# --- the README and the file


def test_every_figure_in_a_table_of_the_readme_has_its_claim() -> None:
    assert readme_problems(README, load_claims()) == []


def with_another_figure(claim: Claim) -> str:
    """The README with one figure of a claim changed where it stands."""
    if isinstance(claim, Quotation):
        sentence = r"\s+".join(map(re.escape, claim.sentence.split()))
        return re.sub(sentence, lambda match: match[0].replace(claim.figure, "9.87654"), README)
    row = claim.content.rows[-1]
    text = next(cell for cell in reversed(row) if figures(cell))
    line = next(line for line in README.splitlines() if all(cell in line for cell in row))
    return README.replace(line, line.replace(text, "9.87654"))


def test_a_figure_that_is_changed_in_the_readme_is_found() -> None:
    found = load_claims()
    for claim in found:
        changed = with_another_figure(claim)
        assert changed != README
        assert any(problem.startswith(f"{claim.name}: ") for problem in readme_problems(changed, found)), claim.name


def test_a_new_row_and_a_new_table_need_claims() -> None:
    added = TABLE + "| weight | 1 g | 2 g |\n"
    assert readme_problems(added, [table_claim()]) == ["no claim: weight, ours: 1 g", "no claim: weight, theirs: 2 g"]
    assert len(readme_problems(TABLE, [])) == 4
    assert readme_problems("| a | b |\n|---|---|\n| `--abits 4` | 8-bit floats (arXiv 2402.02750) |\n", []) == []


def test_two_rows_of_one_name_are_refused() -> None:
    assert readme_problems(TABLE + "| size | 10 KiB | 20 KiB |\n", [table_claim()]) == [
        "two rows of a table are called size"
    ]


def test_a_table_in_plain_text_needs_a_claim() -> None:
    text = "codes   bits   KL\n4 bits  4.00  0.1\n"
    assert len(readme_problems(text, [])) == 3
    assert readme_problems(text, [table_claim(text)]) == []


def test_a_claim_that_left_the_readme_is_found() -> None:
    fewer = TABLE.replace("| size | 10 KiB | 20 KiB |\n", "")
    assert readme_problems(fewer, [table_claim()]) == ["table: not in the README: size"]
    assert "no table of the README" in readme_problems("", [table_claim()])[0]
    assert "does not say: it takes 0.25 of it" in readme_problems("it takes 0.26 of it", [quotation()])[0]


def test_of_two_tables_with_the_same_heading_each_has_its_own_claim() -> None:
    other = TABLE.replace("3.0", "5.0").replace("10", "11")
    both = [table_claim(), table_claim(other).model_copy(update={"name": "other"})]
    assert readme_problems(f"{TABLE}\n{other}", both) == []
    mixed = TABLE.replace("| speed | 3.0", "| speed | 5.0")
    assert readme_problems(f"{mixed}\n{other}", both) == ["table: speed, ours: the README has 5.0 s, the claim 3.0 s"]


def test_a_sentence_covers_its_figure_in_a_table_and_no_other() -> None:
    text = "| a | b |\n|---|---|\n| `x` | it takes 0.25 of it{} |\n"
    assert readme_problems(text.format(""), [quotation()]) == []
    assert readme_problems(text.format(" in 7 s"), [quotation()]) == ["no claim: `x`, b: it takes 0.25 of it in 7 s"]


def test_every_command_of_a_claim_is_one_that_its_program_takes() -> None:
    programs = {"calibrate": calibrate, "evaluate": evaluate, "demo": demo, "compare_recipes": compare_recipes}
    commands = {command for claim in load_claims() for cell in claim.cells() for command in cell.commands}
    found = [command.removeprefix("python -m scripts.").split() for command in sorted(commands)]
    for name, *words in found:
        if name in programs:
            programs[name].parser().parse_args(words)
    assert {name for name, *_ in found} >= set(programs)


def test_what_is_claimed_quickly_needs_no_network_and_no_idle_machine() -> None:
    quick = [claim for claim in load_claims() if not set(claim.needs) - {"shared"}]
    assert {"demo", "stories"} <= {claim.name for claim in quick}
    assert not any("bench" in command or "compare" in command for claim in quick for command in claim.commands)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"unchecked": {"hers": "lost"}}, "no column or row is called hers"), ({"table": "3 s"}, "expected one table")],
)
def test_a_claim_that_cannot_be_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        table_claim(**changes)


def test_a_quotation_holds_its_figure() -> None:
    with pytest.raises(ValueError, match="must stand in the sentence"):
        quotation(figure="0.2")


def test_two_claims_of_one_name_are_refused(tmp_path: Path) -> None:
    entry = json.loads(quotation().model_dump_json())
    (tmp_path / "claims.yaml").write_text(json.dumps([entry, entry]))
    with pytest.raises(ValueError, match="several claims are called share"):
        load_claims(tmp_path / "claims.yaml")


# --- tables and figures


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("-0.0003 ± 0.0004", ["-0.0003", "0.0004"]),
        ("52.8 s / 288 s, 1.05, missed", ["52.8", "288", "1.05"]),
        ("51,000 of 32K in 8-bit `--abits 3` float16 5.17.0", ["51,000"]),
        ("arXiv 2404.00456, 99.75 % of 400", ["99.75", "400"]),
    ],
)
def test_figures_are_numbers_that_stand_for_themselves(text: str, found: list[str]) -> None:
    assert figures(text) == found


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("0.0189 ± 0.0010", "0.0190 ± 0.0009", True),
        ("0.0189 ± 0.0010", "0.0191 ± 0.0010", False),
        ("18.121", "18.2", True),
        ("18.121", "18.3", False),
        ("0", "0.01", False),
        ("51,000", "51000", True),
        ("1.0", "1.0 / 1.0", False),
    ],
)
def test_figures_agree_within_half_a_percent_or_a_last_digit(expected: str, found: str, same: bool) -> None:
    assert agree(expected, found, 0.005) == same


def test_a_share_of_a_large_figure_is_more_than_its_last_digit() -> None:
    assert allowance("100.0", 0.25) == 25
    assert allowance("0.001", 0.25) == 0.001


def test_a_table_survives_being_printed() -> None:
    [table] = find_tables(TABLE)
    assert find_tables(table.to_markdown()) == [table]


# --- outputs and runs


@pytest.mark.parametrize("template", ["[speed][hers]", "[s][ours]", "[sp][ours][0]"])
def test_a_place_that_is_not_in_the_output_is_named(template: str) -> None:
    with pytest.raises(UnreadableError, match="expected one entry"):
        Output(TABLE).fill(template)


def test_a_pattern_that_does_not_match_is_named() -> None:
    assert Output("a 1\nb 2\n").search(r"^b (\d)") == "2"
    with pytest.raises(UnreadableError, match="expected an output with"):
        Output("a 1\n").search(r"^b (\d)")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that were run; each prints the table, with a row more."""
    commands: list[str] = []

    def printed(command: str) -> str:
        commands.append(command)
        return TABLE + "| share | 0.25 | |\n"

    monkeypatch.setattr("scripts.claims.run.run_command", printed)
    return commands


def test_a_table_is_compared_cell_by_cell_and_a_command_runs_once(ran: list[str]) -> None:
    runner, claim = Runner(), table_claim(TABLE.replace("4.0 s", "4.4 s"), unchecked={"ours": "not ours to say"})
    found = [(finding.where, finding.agrees) for finding in runner.check(claim)]
    assert found == [("speed, theirs", False), ("size, theirs", True)]
    runner.check(claim)
    assert ran == ["show speed", "show size"]


def test_a_wrong_figure_is_told_with_what_was_expected_got_and_allowed(ran: list[str]) -> None:
    [finding] = Runner().check(quotation(figure="0.25", read="[share][ours]"))
    assert finding.agrees
    [finding] = Runner().check(quotation(sentence="it takes 0.21 of it", figure="0.21", read="[share][ours]"))
    assert finding.describe() == "0.21: expected 0.21; got 0.25; allowed are ±0.01"
    [finding] = Runner().check(quotation(read="[sharing][ours]"))
    assert not finding.agrees
    assert "expected one entry [sharing]" in finding.found


def test_a_command_that_fails_fails_its_claims(capsys: pytest.CaptureFixture[str]) -> None:
    command = "evaluate --quantizer-path nowhere.safetensors"
    [finding] = Runner().check(quotation(commands=(command,)))
    assert (finding.agrees, finding.found) == (False, f"nothing: `{command}` ended with status 2")
    assert "nowhere.safetensors: no such file" in capsys.readouterr().err


def test_commands_find_their_files_and_the_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "base.yaml").write_text("name: base\nextends: kivi-2\nkey: {group_size: 16}\n")
    claim = quotation(
        sentence="groups of 16",
        figure="16",
        commands=("calibrate --recipe mine.yaml --print-recipe",),
        files={"mine.yaml": "extends: base.yaml\n"},
        read=r"/group_size: (\d+)/",
    )
    [finding] = Runner(tmp_path / "data").check(claim)
    assert finding.agrees, finding.found


def test_programs_are_run_as_they_are_typed() -> None:
    assert "bits: 4" in run_command("calibrate --print-recipe --recipe kivi-4")
    assert run_command("python -m scripts.claims --list demo").startswith("demo [nothing]")


def test_the_program_tells_what_is_skipped_and_what_failed(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVGAUGE_SHARED", str(tmp_path / "nowhere"))
    entries = [
        quotation(name="right", read="[share][ours]"),
        quotation(name="wrong", read="[size][ours]"),
        quotation(name="slow", read="[share][ours]", needs=("idle",)),
        quotation(name="elsewhere", read="[share][ours]", needs=("shared",)),
    ]
    file = tmp_path / "claims.yaml"
    file.write_text(json.dumps([json.loads(entry.model_dump_json()) for entry in entries]))
    assert claims.main(["--file", str(file)]) == 1
    out = capsys.readouterr().out
    assert "ok       right" in out
    assert "FAILED   wrong" in out
    assert "expected 0.25; got 10 KiB" in out
    assert "skipped  slow: needs idle; name it to check it" in out
    assert "skipped  elsewhere: needs the data folder; set KVGAUGE_SHARED" in out
    assert claims.main(["slow", "--file", str(file)]) == 0
    assert claims.main(["slw", "--file", str(file)]) == 2


def test_the_readme_is_checked_by_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claims.main(["--check-readme"]) == 0
    (tmp_path / "README.md").write_text(README.replace("0.0547 ± 0.0064", "0.0546 ± 0.0064"))
    assert claims.main(["--check-readme", "--readme", str(tmp_path / "README.md")]) == 1
    assert "demo: 2 bits, loss in nats per token: the README has 0.0546 ± 0.0064" in capsys.readouterr().out


def test_tables_are_printed_as_they_were_found(
    ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "claims.yaml"
    stale = table_claim(TABLE.replace("10 KiB", "99 KiB"))
    file.write_text(json.dumps([json.loads(stale.model_dump_json())]))
    assert claims.main(["--file", str(file), "--print"]) == 1
    assert find_tables(TABLE)[0] in find_tables(capsys.readouterr().out)
