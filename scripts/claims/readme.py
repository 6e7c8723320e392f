"""Whether claims and README say the same: every figure in a table has a claim, and every claim still stands there."""

import re
from collections.abc import Sequence

from scripts.claims.file import Claim, Quotation, TableClaim
from scripts.claims.tables import Table, figures, find_tables


def readme_problems(readme: str, claims: Sequence[Claim]) -> list[str]:
    """One line for every figure without a claim, cell that differs, and claim that is not in the README.

    Prose may hold figures without a claim; tables may not, in Markdown or in plain text.
    """
    quotations = [claim for claim in claims if isinstance(claim, Quotation)]
    missing = [claim for claim in quotations if _plain(claim.sentence) not in _plain(readme)]
    problems = [f"{claim.name}: the README does not say: {_plain(claim.sentence)}" for claim in missing]
    tables = find_tables(readme)
    homes = {claim.name: _home(claim, tables) for claim in claims if isinstance(claim, TableClaim)}
    for claim in claims:
        if isinstance(claim, TableClaim) and homes[claim.name] is None:
            problems.append(f"{claim.name}: no table of the README has a row under {' | '.join(claim.content.heading)}")
    for index, table in enumerate(tables):
        own = [claim for claim in claims if isinstance(claim, TableClaim) and homes[claim.name] == index]
        problems += _table_problems(table, own) if own else _unclaimed(table, quotations)
    return problems


def _home(claim: TableClaim, tables: Sequence[Table]) -> int | None:
    """The table of the README that a claim is about: with its heading, and the most of its rows and of their names."""
    alike = [index for index, table in enumerate(tables) if table.heading == claim.content.heading]
    rows, labels = set(claim.content.rows), {row[0] for row in claim.content.rows}
    scores = {
        index: (len(rows & set(tables[index].rows)), len(labels & {row[0] for row in tables[index].rows}))
        for index in alike
    }
    best = max(alike, key=lambda index: scores[index], default=None)
    return None if best is None or not any(scores[best]) else best


def _table_problems(table: Table, claims: Sequence[TableClaim]) -> list[str]:
    """Where a table differs from the claims about it."""
    claimed = {row[0]: (claim, row) for claim in claims for row in claim.content.rows}
    shown = {row[0]: row for row in table.rows}
    labels = [row[0] for row in table.rows]
    problems = [f"two rows of a table are called {label}" for label in shown if labels.count(label) > 1]
    problems += [
        f"{claim.name}: not in the README: {label}" for label, (claim, _) in claimed.items() if label not in shown
    ]
    for label, row in shown.items():
        if label not in claimed:
            problems += [f"no claim: {label}, {column}: {text}" for column, text in _figured(table, row)]
            continue
        claim, own = claimed[label]
        problems += [
            f"{claim.name}: {label}, {column}: the README has {ours or 'nothing'}, the claim {theirs or 'nothing'}"
            for column, ours, theirs in zip(table.heading, row, own, strict=True)
            if ours != theirs
        ]
    return problems


def _unclaimed(table: Table, quotations: Sequence[Quotation]) -> list[str]:
    """Figures of a table that no claim is about and no sentence covers."""
    return [
        f"no claim: {row[0]}, {column}: {text}"
        for row in (table.heading, *table.rows)
        for column, text in _figured(table, row)
        if set(figures(text)) - {claim.figure for claim in quotations if _plain(claim.sentence) in _plain(text)}
    ]


def _figured(table: Table, row: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(column, text) for column, text in zip(table.heading, row, strict=True) if figures(text)]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
