"""Pieces of HTML; what comes from outside is escaped here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_TIED = (" ± ", " = ", " %")
"""A space at which no line breaks."""


class Markup(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class TableCell:
    """A cell of a table.

    Parameters
    ----------
    text : str
        What it says.
    heat : float or None
        How strongly it is coloured, 0 to 1; the text alone says as much.
    """

    text: str
    heat: float | None = None


Row = Sequence[str | TableCell]
"""A row of a table; the first cell names it."""


def text(value: str) -> Markup:
    """HTML for a text."""
    if isinstance(value, Markup):
        return value
    # Escaped once, here: text from models, files and commands may hold any character.
    tied = escape(value)
    for sign in _TIED:
        tied = tied.replace(sign, sign.replace(" ", "\u00a0"))
    return Markup(tied)


def element(tag: str, *parts: str, **attributes: str) -> Markup:
    """An element around its parts; `class_` stands for the attribute `class`."""
    named = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{named}>{''.join(map(text, parts))}</{tag}>")


def table(caption: str, head: Sequence[str], rows: Sequence[Row]) -> Markup:
    """A table in a box of its own, which scrolls where the page is too narrow; the first column names the rows."""
    columns = element("tr", *(element("th", name, scope="col") for name in head))
    body = [element("tr", element("th", _text(first), scope="row"), *map(_cell, rest)) for first, *rest in rows]
    whole = element("table", element("caption", caption), element("thead", columns), element("tbody", *body))
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def figure(picture: Markup, caption: str, *, wide: bool = False) -> Markup:
    """A picture with what is to be seen in it."""
    box = element("div", picture, class_="scroll", tabindex="0", role="region", aria_label=caption) if wide else picture
    return element("figure", box, element("figcaption", caption), **({"class_": "wide"} if wide else {}))


def section(name: str, title: str, *parts: str) -> Markup:
    """A section with its heading."""
    return element("section", element("h2", title, id=name), *parts, aria_labelledby=name)


def paragraphs(*texts: str) -> Markup:
    """A paragraph each."""
    return Markup("".join(element("p", own) for own in texts if own))


def heat(value: float | None, largest: float) -> float | None:
    """Style that colours a cell by its value, the largest of its kind most."""
    return None if value is None or largest <= 0 else min(1.0, max(0.0, value / largest))


def _text(cell: str | TableCell) -> str:
    return cell.text if isinstance(cell, TableCell) else cell


def _cell(cell: str | TableCell) -> Markup:
    if isinstance(cell, TableCell) and cell.heat is not None:
        return element("td", cell.text, class_="heat", style=f"--heat:{round(100 * cell.heat)}%")
    return element("td", _text(cell))
