"""A file of results as Markdown: commands, conditions and a table for each group of rows that share them."""

import textwrap
from collections.abc import Sequence
from itertools import groupby

from scripts.results.kinds import KINDS, Column, Kind
from scripts.results.schema import Conditions, Results, Row

WIDTH = 100


def results_text(results: Results) -> str:
    """All of it, for a block of a page."""
    kind = KINDS[results.kind]
    shared = [f"{column.head} {column.cell(results.figures)}" for column in kind.shared if column.cell(results.figures)]
    parts = [wrapped(". ".join([results.title.rstrip("."), *map(_capital, shared)]) + ".")]
    for commands, group in groupby(results.rows, key=results.commands_of):
        parts.append(fenced(commands, kind.first))
        for about, own in groupby(group, key=lambda row: _conditions(results.conditions_of(row))):
            rows = list(own)
            parts += [_taken(about, [results.conditions_of(row) for row in rows]), _table(kind, rows)]
    if results.files:
        parts += ["The files named there:", f"```yaml\n{_files(results.files)}\n```"]
    return "\n\n".join(parts)


def fenced(commands: Sequence[str], row: str) -> str:
    """Commands as a block of code; `{row}` becomes a word that heads the table."""
    lines = (broken(command.replace("{row}", row)) for command in commands)
    return "```\n" + "\n".join(lines) + "\n```"


def broken(command: str) -> str:
    """A command on lines that are not too long, joined by backslashes as a shell reads them.

    Examples
    --------
    >>> print(broken("kvgauge compare --seqlen 256 --recipes " + ",".join(["predictive"] * 9)))
    kvgauge compare --seqlen 256 --recipes predictive,predictive,predictive,predictive,predictive,\\
    predictive,predictive,predictive,predictive
    """
    lines, line = [], ""
    for word in command.replace(",", ",\0").replace(" --", " \0--").split("\0"):
        if len(line + word) > WIDTH - 1 and line:
            lines.append(line + "\\")
            line = ""
        line += word
    return "\n".join([*lines, line])


def wrapped(text: str) -> str:
    """A paragraph."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _conditions(conditions: Conditions) -> str:
    about = {name: getattr(conditions, name) for name in ("model", "text", "machine", "versions")}
    named = "; ".join(f"{name}: {what}" for name, what in about.items())
    return f"{_capital(named)}." + (f" {conditions.note}" if conditions.note else "")


def _taken(about: str, conditions: Sequence[Conditions]) -> str:
    """The paragraph about rows that may have been measured one after another."""
    taken = {", ".join(filter(None, (one.date, one.commit and f"commit {one.commit}"))): None for one in conditions}
    recorded = " and ".join(filter(None, taken))
    return wrapped(about + (f" Recorded {recorded}." if recorded else ""))


def _table(kind: Kind, rows: Sequence[Row]) -> str:
    columns = [column for column in kind.columns if any(column.cell(row.figures) for row in rows)]
    notes = any(row.note for row in rows)
    heads = [kind.first, *(column.head for column in columns), *(["note"] if notes else [])]
    rule = ["---", *("---" if column.words else "--:" for column in columns), *(["---"] if notes else [])]
    lines = [[kind.label(row), *_cells(columns, row), *([row.note or ""] if notes else [])] for row in rows]
    return markdown_table([heads, rule, *lines])


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the second being the rule."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(columns: Sequence[Column], row: Row) -> list[str]:
    return [column.cell(row.figures) for column in columns]


def _files(files: dict[str, str]) -> str:
    return "\n".join(f"# {name}\n{text.rstrip()}" for name, text in files.items())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
