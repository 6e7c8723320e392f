"""Figures as SVG inside the page: text stays text, and colours are those of the page, light or dark."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from kvgauge.report.drawing.markup import Markup

_STYLE: Any = {
    "axes.facecolor": "none",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.facecolor": "none",
    "font.size": 11,
    "hatch.linewidth": 0.8,
    "legend.fontsize": 10,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "kvgauge",
}
_COLOURS = {
    f"#{colour}": f"var(--c{number})"
    for number, colour in enumerate(
        ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "7f7f7f", "bcbd22", "17becf")
    )
}
"""The colours C0 to C9 of matplotlib, which the style sheet gives for light and dark."""

_NO_DATES = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures are drawn for the page."""
    with mpl.rc_context(_STYLE):
        yield


def picture(name: str, alt: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Markup:
    """A figure as it stands in the page.

    Parameters
    ----------
    name : str
        Different for every figure of a page: its names are set apart by it.
    alt : str
        What is to be seen.
    size : tuple of float
        In inches; text has 11 points.
    draw : callable
        Draws into a figure.
    """
    with style():
        own = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(own)
        draw(own)
        written = io.StringIO()
        own.savefig(written, format="svg", metadata=_NO_DATES)
    return Markup(_inline(written.getvalue(), name, alt, size))


def _inline(svg: str, name: str, alt: str, size: tuple[float, float]) -> str:
    # Drawings share the name space of their page, so that each gets names of its own. Fonts and colours are left to
    # the style sheet of the page, light or dark.
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{name}-", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda found: f"{found[1]}: {_colour(found[2])}", body)
    body = re.sub(r"\n\s*", "\n", body)
    width, height = (72 * side for side in size)
    return f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width:g} {height:g}" width="{width:g}">{body}'


def _colour(code: str) -> str:
    """A grey becomes a mixture of the page's ink and ground."""
    red, green, blue = code[1:3], code[3:5], code[5:7]
    if red == green == blue:
        return f"color-mix(in srgb, var(--ink) {100 - int(red, 16) / 2.55:.0f}%, var(--ground))"
    return _COLOURS.get(code, code)
