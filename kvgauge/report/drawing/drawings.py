"""Figures of a report; every function draws JSON values into one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from kvgauge.report.drawing.numbers import context, size
from kvgauge.terminal.pareto import Point, label_points, plot_pareto

Row = Mapping[str, Any]
WHISKER = 2
"""Standard errors to either side of a dot: where the truth lies nineteen times out of twenty."""

_SIDES = (("fp", "full precision", "o", "C0", -0.14), ("quantized", "quantized", "s", "C1", 0.14))
"""Name, label, marker, colour, and how far from the middle of a task's row."""


def losses(rows: Sequence[tuple[str, float, float | None]], figure: Figure) -> None:
    """Nats per token with whiskers, zero being full precision."""
    axes = figure.subplots()
    for place, (_, value, stderr) in enumerate(rows):
        axes.errorbar(value, place, xerr=WHISKER * (stderr or 0.0), fmt="o", color="C0", capsize=4)
    _named_rows(axes, [name for name, _, _ in rows])
    axes.axvline(0, color="0.3", linestyle="--", linewidth=1)
    axes.set_xlabel("nats per token (dashed: full precision)")
    axes.xaxis.set_major_locator(MaxNLocator(5))


def scores(tasks: Sequence[Row], figure: Figure) -> None:
    """Both scores of every task with whiskers."""
    axes = figure.subplots()
    for side, label, marker, color, shift in _SIDES:
        axes.errorbar(
            [task[side] for task in tasks],
            np.arange(len(tasks)) + shift,
            xerr=np.transpose([_whiskers(task[side], task[f"{side}_stderr"]) for task in tasks]),
            fmt=marker,
            color=color,
            capsize=4,
            label=label,
        )
    _named_rows(axes, [task["task"] for task in tasks])
    axes.set(xlabel="score", xlim=(-0.05, 1.05))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def pareto(own: Point | None, others: Sequence[Point], figure: Figure) -> None:
    """Nats over counted bits; this run among the recipes of a comparison."""
    axes = figure.subplots()
    points = [point for point in ([own] if own else []) + list(others) if math.isfinite(point.nats)]
    plot_pareto(points, axes)
    axes.legend().remove()  # every point has its name
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed by pixels, which must not move any more
    label_points(points, axes)
    if own in points:
        axes.plot(own.bits, own.nats, "o", markersize=18, markerfacecolor="none", color="C3")


def ranges(row: Row, figure: Figure) -> None:
    """Smallest to largest value of every channel, the inner 99 %, and the static range over them."""
    axes = figure.subplots()
    channels = np.arange(len(row["minimum"]) + 1) - 0.5
    pale: dict[str, Any] = {"step": "post", "color": "C0", "linewidth": 0}
    axes.fill_between(channels, *_steps(row, "minimum", "maximum"), alpha=0.3, label="smallest to largest", **pale)
    axes.fill_between(channels, *_steps(row, "inner_low", "inner_high"), alpha=0.85, label="inner 99 %", **pale)
    if row["static_low"] is not None:
        low, high = _steps(row, "static_low", "static_high")
        axes.step(channels, low, where="post", color="C3", linewidth=1.3, label="range of the quantizer")
        axes.step(channels, high, where="post", color="C3", linewidth=1.3)
    for boundary in range(row["head_dim"], len(row["minimum"]), row["head_dim"]):
        axes.axvline(boundary - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="channel (dotted: heads)", ylabel="value", xlim=(channels[0], channels[-1]))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, columnspacing=1, handlelength=1.2)


def levels(row: Row, figure: Figure) -> None:
    """A histogram, the levels as lines through it, and thresholds beyond which values are kept."""
    axes = figure.subplots()
    edges = np.linspace(row["low"], row["high"], len(row["shares"]) + 1)
    axes.stairs(100 * np.array(row["shares"]), edges, fill=True, color="C0", alpha=0.55)
    for level in row["levels"]:
        axes.axvline(level, color="C3", linewidth=1.4)
    for threshold in row["thresholds"]:
        axes.axvline(threshold, color="0.3", linewidth=1.2, linestyle="--")
    dashed = ", dashed: beyond it kept exact" if row["thresholds"] else ""
    axes.set(xlabel=f"{row['unit']} (lines: levels{dashed})", ylabel="share of values in %")


def kept_channels(shares: Sequence[float], figure: Figure) -> None:
    """Per cent of each channel's values that are kept beside the codes."""
    axes = figure.subplots()
    axes.stairs(100 * np.array(shares), np.arange(len(shares) + 1) - 0.5, fill=True, color="C0")
    axes.set(xlabel="channel", ylabel="kept exact in %", xlim=(-0.5, len(shares) - 0.5))


def memory(rows: Sequence[Row], figure: Figure) -> None:
    """Bytes over context length, against 16 bits per element."""
    axes = figure.subplots()
    lengths = [row["context_tokens"] for row in rows]
    for name, label, marker, line, color in (
        ("exact_16_bit_bytes", "16 bits per element", "o", "--", "0.3"),
        ("total_bytes", "this cache", "s", "-", "C0"),
    ):
        axes.plot(lengths, [row[name] for row in rows], marker=marker, linestyle=line, color=color, label=label)
        for length, row in zip(lengths, rows, strict=True):
            above = name.startswith("exact")
            place: dict[str, Any] = {"va": "bottom", "ha": "right"} if above else {"va": "top", "ha": "left"}
            offset = (-4, 4) if above else (4, -4)
            axes.annotate(size(row[name]), (length, row[name]), offset, textcoords="offset points", **place)
    axes.set(xscale="log", yscale="log", xlabel="context in tokens", ylabel="one sequence's cache")
    axes.set_xticks(lengths, [context(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator([2.0**power for power in range(10, 60, 4)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.margins(x=0.35, y=0.2)
    axes.legend(frameon=False, loc="upper left")


def _whiskers(score: float, stderr: float | None) -> tuple[float, float]:
    """To either side, as far as there are scores."""
    length = WHISKER * (stderr or 0.0)
    return min(length, score), min(length, 1 - score)


def _named_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _steps(row: Row, low: str, high: str) -> tuple[list[float], list[float]]:
    """Both ends, the last channel drawn to its own end."""
    first, last = row[low], row[high]
    return [*first, first[-1]], [*last, last[-1]]
