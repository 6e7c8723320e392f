"""The claims of the README: sentences and tables, with the commands that reproduce their figures."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self, final

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

from scripts.claims.output import Output
from scripts.claims.tables import Table, figures, find_tables

CLAIMS = Path(__file__).with_name("claims.yaml")

Need = Literal["shared", "idle", "download", "gpu", "hours"]


@dataclass(frozen=True)
class Cell:
    """One text with figures: where it stands, what is claimed, the commands, and how the last one's output is read."""

    where: str
    expected: str
    commands: tuple[str, ...]
    read: Callable[[Output], str]


class AbstractClaim(BaseModel):
    """What every claim has.

    Parameters
    ----------
    name : str
        To ask for it on the command line.
    sentence : str
        What is claimed.
    commands : tuple of str
        As a user types them, one after another in an empty folder; the last one's output is read.
    needs : tuple of str
        `shared`: the data folder, whose files then lie in that folder; `idle`: a machine with nothing else to do;
        `download`, `gpu`, `hours`. Empty: nothing.
    files : dict from str to str
        Texts that lie in the folder, by name.
    tolerance : float
        Share by which a figure may be off; one unit of its last decimal is always allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sentence: str
    commands: tuple[str, ...]
    needs: tuple[Need, ...] = ()
    files: dict[str, str] = {}
    tolerance: float = 0.005

    @abstractmethod
    def cells(self) -> list[Cell]:
        """What is compared."""


@final
class Quotation(AbstractClaim):
    """A figure in a sentence of the README, which stands there word for word.

    Parameters
    ----------
    figure : str
        As it stands in the sentence.
    read : str
        A place in the output, see `Output.fill`; or, between slashes, a regular expression with one group.
    """

    figure: str
    read: str

    @model_validator(mode="after")
    def _holds_its_figure(self) -> Self:
        if self.figure not in figures(self.sentence):
            raise ValueError(f"{self.name}: the figure {self.figure} must stand in the sentence; got {self.sentence!r}")
        return self

    def cells(self) -> list[Cell]:
        """The figure."""
        is_pattern = self.read.startswith("/") and self.read.endswith("/")
        read = (
            partial(Output.search, pattern=self.read[1:-1]) if is_pattern else partial(Output.fill, template=self.read)
        )
        return [Cell(self.figure, self.figure, self.commands, read)]


@final
class TableClaim(AbstractClaim):
    """Rows of a table of the README.

    Parameters
    ----------
    table : str
        As it stands there, or some of its rows below its heading. In commands, `{row}` is the first cell of a row.
    read : dict from str to str
        By column, see `Output.fill`; `{row}` as above. A column that is not named stands in a table of the output, in
        the same row and under the same name.
    names : dict from str to str
        What `{row}` stands for instead, by first cell.
    unchecked : dict from str to str
        Columns that no command reproduces, with the reason.
    """

    table: str
    read: dict[str, str] = {}
    names: dict[str, str] = {}
    unchecked: dict[str, str] = {}

    @cached_property
    def content(self) -> Table:
        """The table."""
        found = find_tables(self.table)
        if len(found) != 1:
            raise ValueError(f"{self.name}: expected one table, with a heading; got {len(found)}")
        return found[0]

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Self:
        table = self.content
        columns, labels = set(self.columns()), {row[0] for row in table.rows}
        unknown = ({*self.read, *self.unchecked} - columns) | (set(self.names) - labels)
        if unknown:
            raise ValueError(f"{self.name}: no column or row is called {', '.join(sorted(unknown))}")
        return self

    def columns(self) -> list[str]:
        """Names of the columns; of equal ones the later are numbered, as in `nats (2)`."""
        heading = self.content.heading
        counts = [heading[: index + 1].count(name) for index, name in enumerate(heading)]
        return [name if count == 1 else f"{name} ({count})" for name, count in zip(heading, counts, strict=True)]

    def cells(self) -> list[Cell]:
        """Every cell with figures but the first of a row and those that cannot be checked."""
        return [
            self._cell(row[0], column, text)
            for row in self.content.rows
            for column, text in list(zip(self.columns(), row, strict=True))[1:]
            if figures(text) and column not in self.unchecked
        ]

    def _cell(self, label: str, column: str, text: str) -> Cell:
        row = self.names.get(label, label.strip("`"))
        template = self.read.get(column, f"[{{row}}][{column}]").replace("{row}", row)
        commands = tuple(command.replace("{row}", row) for command in self.commands)
        return Cell(f"{label}, {column}", text, commands, partial(Output.fill, template=template))


Claim = Quotation | TableClaim


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of a file.

    Raises
    ------
    ValueError
        If the file holds others than claims, or two of one name.
    """
    claims = TypeAdapter(list[Claim]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    names = [claim.name for claim in claims]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path.name}: several claims are called {', '.join(twice)}; give each a name of its own")
    return claims
