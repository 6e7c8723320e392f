"""Markdown tables whose columns also line up as text."""

from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], n_words: int = 1) -> str:
    """The table.

    Parameters
    ----------
    head : sequence of str
        Names of the columns.
    rows : sequence of sequences of str
        A cell for each column.
    n_words : int
        So many columns, from the first, hold words and are flush left; the others hold figures.
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(2, *(len(line[column]) for line in lines)) for column in range(len(head))]  # a rule has two signs
    rule = ["-" * width if column < n_words else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    aligned = [
        [cell.ljust(width) if column < n_words else cell.rjust(width) for column, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [aligned[0], rule, *aligned[1:]])
