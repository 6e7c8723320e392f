"""Section of the page on tasks: scores with their errors, by length and depth."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kvgauge.report.drawing import drawings
from kvgauge.report.drawing.markup import Markup, Row, TableCell, element, figure, heat, paragraphs, section, table
from kvgauge.report.drawing.numbers import plain, with_error
from kvgauge.report.drawing.picture import picture

Found = Mapping[str, Any]

WHISKERS = "Whiskers reach two standard errors to either side."
"""Meaning of the error bars."""


def scores(tasks: Sequence[Found]) -> Markup:
    """Dots and whiskers for every task."""
    words = "; ".join(f"{task['task']} {plain(task['fp'])} to {plain(task['quantized'])}" for task in tasks)
    drawn = picture("scores", f"Scores: {words}", (5.4, 1.3 + 0.5 * len(tasks)), partial(drawings.scores, tasks))
    return figure(
        drawn, f"Scores of tasks, full precision (dots) and quantized (squares). {WHISKERS} No score leaves 0 to 1."
    )


def task_table(tasks: Sequence[Found]) -> Markup:
    """The same scores as figures, with the paired differences."""
    rows = [
        (
            task["task"],
            str(task["n"]),
            *(with_error(task[side], task[f"{side}_stderr"]) for side in ("fp", "quantized", "difference")),
        )
        for task in tasks
    ]
    metrics = ". ".join(f"{task['task']}: {task['metric']}" for task in tasks)
    caption = f"Scores from 0 to 1, ± one standard error over items; differences are paired. {metrics}."
    return table(caption, ("task", "n", "full precision", "quantized", "difference"), rows)


def harness_table(lm_eval: Found) -> Markup:
    """Metrics of lm-eval, which have scales of their own."""
    rows: list[Row] = [
        [
            f"{task}, {metric}",
            "unknown" if row["n"] is None else str(row["n"]),
            *(with_error(row[side], row[f"{side}_stderr"]) for side in ("fp", "quantized")),
            with_error(row["difference"], row["difference_stderr"]) if "difference" in row else "unknown",
        ]
        for task, metrics in lm_eval["tasks"].items()
        for metric, row in metrics.items()
    ]
    caption = f"Tasks of lm-eval, ± one standard error. Protocol: {lm_eval['protocol']}."
    return table(caption, ("task, metric", "n", "full precision", "quantized", "difference"), rows)


def grids(found: Found) -> Markup | None:
    """Scores over length and depth, where a task has both."""
    own = [task for task in found["tasks"].values() if _length_name(task)]
    if not own:
        return None
    sides = (("fp", "full precision"), ("quantized", "quantized"))
    tables = [_grid(task, side, name) for task in own for side, name in sides]
    note = paragraphs("Colour marks what is lost; the scores are from 0 to 1, the depth from 0 (first) to 1 (last).")
    return section("grids", "Found by length and depth", note, element("div", *tables, class_="pair"))


def _length_name(task: Found) -> str | None:
    """A task's word for the length of a text in its cells, where these have a depth too and nothing else."""
    names = set(task["cells"][0]) - {"n", "fp", "quantized"} if task["cells"] else set()
    return (names - {"depth"}).pop() if len(names) == 2 and "depth" in names else None


def _grid(task: Found, side: str, name: str) -> Markup:
    length = _length_name(task)
    lengths, depths = (sorted({cell[key] for cell in task["cells"]}) for key in (length, "depth"))
    cells = {(cell[length], cell["depth"]): cell for cell in task["cells"]}
    rows: list[Row] = [
        [f"depth {depth:g}", *(_grid_cell(cells.get((x, depth)), side) for x in lengths)] for depth in depths
    ]
    return table(
        f"{task['task']}, {name}", ("", *(f"{x} {'tokens' if length == 'length' else length}" for x in lengths)), rows
    )


def _grid_cell(cell: Found | None, side: str) -> TableCell:
    return (
        TableCell("none")
        if cell is None
        else TableCell(f"{cell[side]:.2f}, n = {cell['n']}", heat(1 - cell[side], 1.0))
    )
