"""The picture of a comparison: nats lost over counted bits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

_MARKERS = "os^DvP*X<>ph8dH+x1"
_MARKER_PIXELS, _GAP_PIXELS = 7.0, 2.0
_TICKS = (0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32)
_NEAR = 10
_OFFSETS = [
    (distance * math.cos(turn * math.pi / 6), distance * math.sin(turn * math.pi / 6))
    for distance in (_NEAR, 18, 30, 45, 65, 90)
    for turn in range(12)
]
"""Places for a label, in points from its mark, nearest first."""


@dataclass(frozen=True)
class Point:
    """A recipe in the picture: bits per element, nats lost per token, and their standard error (nan if unknown)."""

    name: str
    bits: float
    nats: float
    stderr: float

    @property
    def family(self) -> str:
        """First word of the name: recipes of one family share marker and colour."""
        return self.name.partition("-")[0]


def save_pareto(points: Sequence[Point], title: str, path: Path) -> None:
    """Writes the picture, the same bytes for the same points; recipes without a finite loss are named above it."""
    shown = [point for point in points if math.isfinite(point.nats)]
    hidden = ", ".join(point.name for point in points if point not in shown)
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if shown:
        plot_pareto(shown, axes)
    axes.set_title(title + (f"\nnot shown, the loss is not finite: {hidden}" if hidden else ""), fontsize=10)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed by pixels, which must not move any more
    label_points(shown, axes)
    with rc_context({"svg.hashsalt": "kvgauge"}):  # names of marks inside an SVG, else random
        figure.savefig(path, dpi=figure.dpi, metadata={"Date": None} if path.suffix == ".svg" else None)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that lose less than all with as few bits, by bits.

    Examples
    --------
    >>> [p.name for p in pareto_front([Point("a", 2, 0.3, 0), Point("b", 3, 0.4, 0), Point("c", 4, 0.1, 0)])]
    ['a', 'c']
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.nats)):
        if not front or point.nats < front[-1].nats:
            front.append(point)
    return front


def plot_pareto(points: Sequence[Point], axes: Axes) -> None:
    """Every recipe with its standard error, families by marker and colour, the Pareto front, and the exact cache.

    The vertical axis is linear up to the median standard error, where differences are noise, and logarithmic beyond:
    losses of zero and below have their place.
    """
    front = pareto_front(points)
    axes.axhline(0, color="0.3", linewidth=1, linestyle="--", label="full precision")
    axes.step([p.bits for p in front], [p.nats for p in front], where="post", color="0.6", label="Pareto front")
    for number, (family, own) in enumerate(_families(points).items()):
        axes.errorbar(
            [p.bits for p in own],
            [p.nats for p in own],
            yerr=np.nan_to_num([p.stderr for p in own]),
            fmt=_MARKERS[number % len(_MARKERS)],
            color=f"C{number % 10}",
            elinewidth=1,
            capsize=2,
            label=family,
        )
    _scale(points, axes)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xlabel="counted bits per element, keys and values", ylabel="nats lost per token")


def label_points(points: Sequence[Point], axes: Axes) -> None:
    """Names beside the points, where they cover neither a point nor another name as far as there is such a place."""
    spots = [axes.transData.transform((point.bits, point.nats)) for point in points]
    taken = [Bbox([spot - _MARKER_PIXELS, spot + _MARKER_PIXELS]) for spot in spots]
    for point in points:
        taken.append(_label(point, axes, taken))


def _families(points: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.family, []).append(point)
    return found


def _scale(points: Sequence[Point], axes: Axes) -> None:
    errors = [point.stderr for point in points if math.isfinite(point.stderr) and point.stderr > 0]
    # Losses span decades, and some are zero or below, which a logarithm cannot show: linear within the noise, where
    # order means nothing, and logarithmic beyond.
    threshold = float(np.median(errors)) if errors else 1e-4
    decades = [sign * 10.0**n for n in range(math.ceil(math.log10(threshold)), 3) for sign in (1, -1)]
    axes.set_yscale("symlog", linthresh=threshold)
    axes.yaxis.set_major_locator(FixedLocator([0, *decades]))
    axes.yaxis.set_minor_locator(FixedLocator([m * decade for decade in decades for m in range(2, 10)]))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(p.bits for p in points) / 1.3, max(p.bits for p in points) * 1.3)  # holds a tick in any case
    axes.margins(y=0.1)


def _label(point: Point, axes: Axes, taken: Sequence[Bbox]) -> Bbox:
    """Writes the point's name and returns the pixels it takes: at the nearest free place, else at the nearest."""
    frame = axes.get_window_extent()
    where = (point.bits, point.nats)
    text = axes.annotate(point.name, where, (0, 0), textcoords="offset points", va="center", fontsize=8)
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5})  # lines run under it
    own = text.get_window_extent()
    # Greedy: the nearest place that covers neither a mark nor an earlier label. Twelve directions by six distances are
    # enough for some thirty recipes; a line leads to a label that had to go far.
    places = [(offset, _moved(own, offset, axes.figure.dpi / 72)) for offset in _OFFSETS]
    free = [(offset, box) for offset, box in places if _inside(box, frame) and not box.count_overlaps(taken)]
    offset, box = (free or places)[0]
    text.set_position(offset)
    text.set_horizontalalignment(_alignment(offset))
    if math.hypot(*offset) > 1.5 * _NEAR:
        line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6}
        axes.annotate("", where, offset, textcoords="offset points", arrowprops=line)
    return box


def _moved(box: Bbox, offset: tuple[float, float], pixels: float) -> Bbox:
    """Box of a text that starts at its mark, moved to grow away from a place so many points from there."""
    before = {"left": 0.0, "center": 0.5, "right": 1.0}[_alignment(offset)]
    moved = box.translated(offset[0] * pixels - before * box.width, offset[1] * pixels)
    return moved.padded(_GAP_PIXELS)


def _alignment(offset: tuple[float, float]) -> Literal["left", "center", "right"]:
    return "center" if abs(offset[0]) < 1 else "left" if offset[0] > 0 else "right"


def _inside(box: Bbox, frame: Bbox) -> bool:
    return bool(frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1)
