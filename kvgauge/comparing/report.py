"""Results of a comparison: `results.json`, `table.md` and `pareto.png`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvgauge.comparing.compared_recipe import LEGEND, ComparedRecipe, table
from kvgauge.configuration.model import short_name
from kvgauge.running.machine import hardware, versions
from kvgauge.terminal.outputs import replace_text
from kvgauge.terminal.pareto import Point, save_pareto


def write_report(folder: Path, about: dict[str, Any], rows: Sequence[ComparedRecipe]) -> None:
    """Writes the three files, each whole or not at all, replacing earlier ones.

    Parameters
    ----------
    folder : Path
        An existing folder.
    about : dict
        `command`, `model`, `perplexity` of the exact model, `calibration` and `evaluation` (`text`, `n_windows` and
        more), `window_tokens`, `seconds` (`gather` by stage, `bare` passes over both texts), `error_windows`, and
        `skipped` recipes with reasons.
    rows : Sequence[ComparedRecipe]
        In the order of the table.
    """
    machine = {"hardware": hardware(), "versions": versions()}
    results = {**about, **machine, "recipes": [row.to_json() for row in rows]}
    replace_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    replace_text(folder / "table.md", _markdown(about, rows))
    points = [Point(row.name, row.mean_bits, row.result.loss_nats, row.result.loss_nats_stderr) for row in rows]
    save_pareto(points, _title(about), folder / "pareto.png")


def _markdown(about: dict[str, Any], rows: Sequence[ComparedRecipe]) -> str:
    skipped = [f"- {name}: {reason}" for name, reason in about["skipped"].items()]
    parts = [
        f"{_title(about)}. {hardware()}.",
        f"```\n{about['command']}\n```",
        table(rows),
        LEGEND,
        _seconds(about["seconds"]),
        *(["Skipped:\n\n" + "\n".join(skipped)] if skipped else []),
    ]
    return "\n\n".join(parts) + "\n"


def _seconds(taken: dict[str, Any]) -> str:
    bare = taken["bare"]
    gathered = [f"{seconds:.1f} ({stage})" for stage, seconds in taken["gather"].items() if seconds is not None]
    return (
        f"Seconds of gathering statistics: {', '.join(gathered) or 'not known'}; of bare forward passes of the same "
        f"windows: {bare['calibration']:.1f}; of the evaluated ones: {bare['evaluation']:.1f}."
    )


def _title(about: dict[str, Any]) -> str:
    calibration, evaluation = about["calibration"], about["evaluation"]
    return (
        f"{short_name(about['model'])} on {evaluation['n_windows']} windows of {about['window_tokens']} tokens of "
        f"{evaluation['text']} (perplexity {about['perplexity']:.4f}), protocol {evaluation['protocol']}, calibrated "
        f"on {calibration['n_windows']} of {calibration['text']}"
    )
