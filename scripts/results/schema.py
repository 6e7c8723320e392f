"""A file of measured figures: rows, each with the commands that gave it and the conditions they ran under."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

Need = Literal["shared", "idle", "download", "hours"]
KindName = Literal[
    "evaluated", "compared", "tasks", "ablated", "demo", "benchmark", "saved_cache", "families", "limits"
]
Figures = dict[str, JsonValue]

RESULTS = Path(__file__).parents[2] / "docs" / "results"


class ResultsError(ValueError):
    """A file, a page or a run that does not hold what it should."""


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Conditions(_Typed):
    """Machine, versions, model and text of a measurement.

    Parameters
    ----------
    machine, versions : str
        Processor, cores and torch; releases of kvgauge and transformers. "not recorded" where nobody knows any more.
    model, text : str
        The model, and what it was calibrated and scored on.
    date, commit : str or None
        When the figures were taken, and on which commit, where known.
    note : str or None
        What else a reader must know.
    """

    machine: str
    versions: str
    model: str
    text: str
    date: str | None = None
    commit: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        empty = [name for name in ("machine", "versions", "model", "text") if not getattr(self, name).strip()]
        if empty:
            raise ValueError(f"conditions: {', '.join(empty)} must not be empty; write 'not recorded' if nobody knows")
        return self


class Row(_Typed):
    """One row of a table.

    Parameters
    ----------
    name : str
        A recipe, options, a task or what was timed; `{row}` stands for it in commands.
    figures : dict
        Numbers by name as the program printed them, nested alike; words and yes or no where a program has them.
    commands, conditions : optional
        Where they differ from those of the file.
    note : str or None
        A remark for the table.
    """

    name: str
    figures: Figures
    commands: tuple[str, ...] | None = None
    conditions: Conditions | None = None
    note: str | None = None


class Results(_Typed):
    """A file under `docs/results/`.

    Parameters
    ----------
    title : str
        A sentence.
    kind : str
        Columns of the table, and the place of the figures in what the programs write: see `scripts/results/kinds.py`.
    needs : tuple of str
        `shared`: the data folder; `hours`, `idle` (a machine with nothing else to do), `download`.
    commands : tuple of str
        As a user types them, one after another in an empty folder.
    conditions : Conditions or None
        For the rows that have none of their own.
    files : dict from str to str
        Texts that the commands read, by name.
    figures : dict
        Those that all rows share, such as the perplexity of the exact model.
    rows : tuple of Row
        In the order of the table.
    """

    title: str
    kind: KindName
    needs: tuple[Need, ...] = ()
    commands: tuple[str, ...] = ()
    conditions: Conditions | None = None
    files: dict[str, str] = {}
    figures: Figures = {}
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _holds_what_a_reader_needs(self) -> Self:
        names = [row.name for row in self.rows]
        for row in self.rows:
            if names.count(row.name) > 1:
                raise ValueError(f"two rows are called {row.name!r}; give each a name of its own")
            if not self.commands_of(row):
                raise ValueError(f"row {row.name!r} has no command; give it one, or the file one for all rows")
            if (row.conditions or self.conditions) is None:
                raise ValueError(f"row {row.name!r} has no conditions; give it some, or the file some for all rows")
            if not all(math.isfinite(value) for _, value in numbers(row.figures)):
                raise ValueError(f"row {row.name!r}: figures must be finite; leave out what there is not")
        return self

    def commands_of(self, row: Row) -> tuple[str, ...]:
        """The row's own, else those of the file; `{row}` stands for its name."""
        return self.commands if row.commands is None else row.commands

    def conditions_of(self, row: Row) -> Conditions:
        """The row's own, else those of the file."""
        found = row.conditions or self.conditions
        assert found is not None, "checked when the file was read"
        return found

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises
        ------
        ResultsError
            If there is none.
        """
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise ResultsError(f"no row is called {name!r}; there are {', '.join(row.name for row in self.rows)}")
        return found[0]


def numbers(figures: JsonValue, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number with its dotted path.

    Examples
    --------
    >>> list(numbers({"bits": {"key": 2.0}, "causal": True, "unit": "s"}))
    [('bits.key', 2.0)]
    """
    if isinstance(figures, dict):
        for name, value in figures.items():
            yield from numbers(value, f"{path}.{name}" if path else name)
    elif isinstance(figures, int | float) and not isinstance(figures, bool):
        yield path, figures


def load(path: Path) -> Results:
    """A file of results.

    Raises
    ------
    ResultsError
        If it is none; the message names the file.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, row['loc']))}: {row['msg']}".lstrip(": ") for row in error.errors())
        raise ResultsError(f"{path.name}: {reasons}") from error


def load_all(folder: Path = RESULTS) -> dict[str, Results]:
    """Every file of a folder, by name without the suffix."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def to_text(results: Results) -> str:
    """Content of a file, with one row a line; defaults are left out."""
    found = results.model_dump(mode="json", exclude_defaults=True)
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in found.pop("rows", []))
    head = json.dumps(found, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n "rows": [\n{rows}\n ]\n}}\n'
