"""Figures that were measured now, put into a file of results."""

import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from kvgauge.running.machine import hardware, versions
from kvgauge.terminal.outputs import replace_text
from scripts.results.run import SHARED
from scripts.results.schema import Conditions, Figures, KindName, Results, ResultsError, Row, load, to_text


def now(model: str, text: str, note: str | None = None) -> Conditions:
    """This machine, these versions, today and this commit."""
    return Conditions(
        machine=hardware(),
        versions=releases(versions()),
        model=model,
        text=text,
        date=datetime.now(UTC).date().isoformat(),
        commit=_commit(),
        note=note,
    )


def record(
    path: Path,
    kind: KindName,
    title: str,
    commands: Sequence[str],
    conditions: Conditions,
    figures: Mapping[str, Figures],
) -> None:
    """Adds rows to a file, or takes the place of those with the same names; the others stay.

    Parameters
    ----------
    path : Path
        Made where it does not exist, with the title and the kind.
    commands, conditions
        Of the new rows.
    figures : Mapping[str, Figures]
        By name of the row, in the order of the table.
    """
    before = load(path) if path.exists() else Results(title=title, kind=kind, rows=())
    rows = {row.name: row for row in before.rows}
    for name, own in figures.items():
        note = rows[name].note if name in rows else None
        rows[name] = Row(name=name, figures=own, commands=tuple(commands), conditions=conditions, note=note)
    replace_text(path, to_text(hoisted(before.model_copy(update={"rows": tuple(rows.values())}))))


def remeasured(results: Results, figures: Mapping[str, Figures], machine: Mapping[str, str]) -> str:
    """The text of a file whose rows have the figures that its commands give now, and the conditions of now.

    Parameters
    ----------
    results : Results
        The file as it is.
    figures : Mapping[str, Figures]
        By name of the row, and `SHARED`.
    machine : Mapping[str, str]
        `machine` and `versions` where the commands ran; empty for this machine.

    Raises
    ------
    ResultsError
        If the commands gave no figures for a row.
    """
    missing = [row.name for row in results.rows if row.name not in figures]
    if missing:
        raise ResultsError(f"expected figures for {', '.join(missing)}; the commands gave none. Nothing is written")
    rows = []
    for row in results.rows:
        before = results.conditions_of(row)
        published = {"published": row.figures["published"]} if "published" in row.figures else {}
        today = now(before.model, before.text, before.note)
        own = {"figures": {**figures[row.name], **published}, "conditions": today.model_copy(update=machine)}
        rows.append(row.model_copy(update=own))
    return to_text(hoisted(results.model_copy(update={"rows": tuple(rows), "figures": figures[SHARED]})))


def hoisted(results: Results) -> Results:
    """The same, with commands and conditions that all rows share written once; checked anew."""
    shared: dict[str, object] = {}
    for name, of in (("commands", results.commands_of), ("conditions", results.conditions_of)):
        first, *others = [of(row) for row in results.rows]
        if all(other == first for other in others):
            shared[name] = first
    rows = [row.model_copy(update=dict.fromkeys(shared)) for row in results.rows]
    return Results.model_validate({**dict(results), **shared, "rows": rows})


def releases(found: Mapping[str, str]) -> str:
    """Releases by the name of what was released, as conditions write them."""
    return ", ".join(f"{name} {release}" for name, release in found.items())


def _commit() -> str | None:
    """Short name of the commit, with a plus if files have changed since; None outside a checkout."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
