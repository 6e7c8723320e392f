"""Results of a sweep: `summary.json`, `summary.csv`, `summary.md` and a Pareto plot for each model."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvgauge.configuration.tasks import PERPLEXITY
from kvgauge.sweeping.cell import Cell, readable
from kvgauge.sweeping.run import Outcome
from kvgauge.sweeping.tasks import TASKS
from kvgauge.terminal.outputs import replace_text
from kvgauge.terminal.pareto import Point, save_pareto
from kvgauge.terminal.text_table import text_table

Row = dict[str, Any]


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Finished cells, a row each: by model and task, fewest bits first. Bits are those counted for perplexity."""
    finished = [(outcome.cell, outcome.result) for outcome in outcomes if outcome.result is not None]
    counted = {(cell.model, cell.recipe.name): result["bits"] for cell, result in finished if cell.task == PERPLEXITY}
    found = [_row(cell, result, counted.get((cell.model, cell.recipe.name), {})) for cell, result in finished]
    return sorted(found, key=lambda row: (row["model"], row["task"], row["bits"] or 0.0, row["recipe"]))


def failures(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """Cells that failed, with the errors."""
    return [
        {"model": o.cell.model, "recipe": o.cell.recipe.name, "task": o.cell.task, "error": o.error}
        for o in outcomes
        if o.error is not None
    ]


def table(found: Sequence[Row]) -> str:
    """The rows for people."""
    head = ("model", "recipe", "task", "bits", "fp", "quantized", "cost", "of", "n")
    cells = [
        (
            row["model"],
            row["recipe"],
            row["task"],
            number(row["bits"], ".3f"),
            number(row["fp"], ".4f"),
            number(row["quantized"], ".4f"),
            f"{number(row['value'], '+.4f')} ± {number(row['stderr'], '.4f')}",
            row["metric"],
            str(row["n"]),
        )
        for row in found
    ]
    return text_table(head, cells, n_words=3)


def number(value: float | None, form: str) -> str:
    """A figure for a table."""
    return "-" if value is None else format(value, form)


def write_report(folder: Path, about: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Writes the files, each whole or not at all, replacing earlier ones.

    Parameters
    ----------
    folder : Path
        An existing folder.
    about : dict
        JSON values that say what was run.
    outcomes : sequence of Outcome
        Of all cells.
    """
    found, failed = rows(outcomes), failures(outcomes)
    summary = {**about, "cells": found, "failed": failed}
    replace_text(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    replace_text(folder / "summary.csv", _csv(found))
    lines = [f"- {row['model']}, {row['recipe']}, {row['task']}: {row['error']}" for row in failed]
    missing = "\n\nFailed:\n\n" + "\n".join(lines) if failed else ""
    replace_text(folder / "summary.md", f"```\n{about['command']}\n```\n\n{table(found)}{missing}\n")
    for model in dict.fromkeys(row["model"] for row in found):
        _plot(folder, model, [row for row in found if row["model"] == model and row["task"] == PERPLEXITY])


def _row(cell: Cell, result: dict[str, Any], bits: dict[str, Any]) -> Row:
    return {
        "model": cell.model,
        "recipe": cell.recipe.name,
        "task": cell.task,
        "bits": bits.get("average"),
        "key_bits": bits.get("key"),
        "value_bits": bits.get("value"),
        **asdict(TASKS[cell.task].headline(result)),
        "file": f"cells/{cell.name}.json",
    }


def _csv(found: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]) if found else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _plot(folder: Path, model: str, found: Sequence[Row]) -> None:
    points = [Point(row["recipe"], row["bits"], *(_float(row[name]) for name in ("value", "stderr"))) for row in found]
    if points:
        title = f"{model}, perplexity {number(found[0]['fp'], '.4f')}, {found[0]['n']} targets"
        save_pareto(points, title, folder / f"pareto-{readable(model)}.png")


def _float(value: float | None) -> float:
    return math.nan if value is None else value
