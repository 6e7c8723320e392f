"""Tables in Markdown and in plain text, and the figures that stand in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_CODE = re.compile(r"`[^`]*`")
_REFERENCE = re.compile(r"\b\d{4}\.\d{5}\b")
_FIGURE = re.compile(r"(?<![\w.-])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w-]|\.\d)")
_RULE = re.compile(r"\|[-:| ]+\|")
_ROUNDING = 1 + 1e-9  # so that a difference of exactly one unit passes
_FEWEST_COLUMNS = 3  # of a table in plain text: two runs of words with a wide gap between them are a comment


@dataclass(frozen=True)
class Table:
    """Names of the columns, and the rows in order, each with a cell for every column; the first names the row."""

    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """The table as Markdown, without aligning columns."""
        lines = [self.heading, ("---",) * len(self.heading), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def find_tables(text: str) -> list[Table]:
    """The tables of a text: Markdown, and columns with at least two blanks between them.

    Examples
    --------
    >>> find_tables("about 2 things\\nwhat   ours  theirs\\nspeed   3 s     4 s\\n")
    [Table(heading=('what', 'ours', 'theirs'), rows=(('speed', '3 s', '4 s'),))]
    """
    return [Table(lines[0], tuple(lines[1:])) for lines in _runs(text) if len(lines) > 1]


def figures(text: str) -> list[str]:
    """The numbers of a text that stand for themselves: not in code, not in words such as 8-bit, no arXiv ids.

    Examples
    --------
    >>> figures("0.0189 ± 0.0010 of 51,000 `--abits 4`, 32K, 8-bit (arXiv 2402.02750)")
    ['0.0189', '0.0010', '51,000']
    """
    return _FIGURE.findall(_REFERENCE.sub("", _CODE.sub("", text)))


def allowance(figure: str, tolerance: float) -> float:
    """By how much a figure may be off: a share of it, or one unit of its last decimal where that is more.

    Examples
    --------
    >>> allowance("0.0189", 0.005), allowance("400", 0.005), allowance("0", 0.005), allowance("7.24e+06", 0.005)
    (0.0001, 2.0, 0.0, 36200.0)
    """
    digits, _, exponent = figure.partition("e")
    decimals = len(digits.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - decimals) if decimals else 0.0
    return max(tolerance * abs(_number(figure)), unit)


def agree(expected: str, found: str, tolerance: float) -> bool:
    """Whether two texts hold the same figures, within the tolerance.

    Examples
    --------
    >>> agree("4.906 ± 0.010", "4.91 ± 0.011", 0.005), agree("4.906", "4.95", 0.005), agree("none", "4.95", 0.005)
    (True, False, False)
    >>> agree("7.242e+06 bytes", "1.1e+06 bytes", 0.005)
    False
    """
    ours, theirs = figures(expected), figures(found)
    if len(ours) != len(theirs):
        return False
    pairs = zip(ours, theirs, strict=True)
    return all(abs(_number(one) - _number(other)) <= allowance(one, tolerance) * _ROUNDING for one, other in pairs)


def _number(figure: str) -> float:
    return float(figure.replace(",", ""))


def _runs(text: str) -> Iterator[list[tuple[str, ...]]]:
    """Lines one after another that have as many columns."""
    run: list[tuple[str, ...]] = []
    for line in [*text.splitlines(), ""]:
        cells = _cells(line)
        if run and len(cells) != len(run[0]):
            yield run
            run = []
        if cells and not _RULE.fullmatch(line.strip()):
            run.append(cells)


def _cells(line: str) -> tuple[str, ...]:
    stripped = line.strip()
    if stripped.startswith("|"):
        return tuple(cell.strip() for cell in stripped.strip("|").split("|"))
    cells = tuple(re.split(r" {2,}", stripped))
    return cells if len(cells) >= _FEWEST_COLUMNS else ()
