"""Results of a search: `search.json`, `search.md`, and the winner as `best.yaml`."""

import json
from pathlib import Path
from typing import Any

from kvgauge.sweeping.search.search import Found, SearchTrial
from kvgauge.terminal.outputs import replace_text
from kvgauge.terminal.text_table import text_table


def write_search(folder: Path, command: str, found: Found) -> None:
    """Writes the files, each whole or not at all, replacing earlier ones.

    Parameters
    ----------
    folder : Path
        An existing folder.
    command : str
        What was typed.
    found : Found
        What the search gave.
    """
    results = {"command": command, **_json(found)}
    replace_text(folder / "search.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    replace_text(folder / "search.md", f"```\n{command}\n```\n\n{_table(found)}\n\n{verdict(found)}\n")
    if found.best is not None and found.best.recipe is not None:
        replace_text(folder / "best.yaml", found.best.recipe.to_yaml())


def verdict(found: Found) -> str:
    """The winner in words, on the windows that chose it and on those that did not."""
    search, n = found.search, found.n_windows
    if found.best is None:
        least = min((trial.bits for trial in found.trials), default=float("inf"))
        return f"Nothing is within {search.budget_bits} bits; the least was {least:.3f}. Raise budget_bits."
    held_out = found.held_out["best"]
    return (
        f"Best within {search.budget_bits} bits of {len(found.trials)} settings: {_words(found.best)}.\n"
        f"{search.objective} {_figure(found.best, found)} on the {n} windows that chose it, "
        f"{_figure(held_out, found)} on {n} others.\n"
        f"The recipe as it is: {_figure(found.trials[0], found)} and {_figure(found.held_out['as it is'], found)}.\n"
        "The first figure of the best is biased: the least of many is partly luck. Quote the second, which had no part "
        "in the choice; compare it with the recipe as it is on the same windows."
    )


def _table(found: Found) -> str:
    budget = found.search.budget_bits
    ordered = sorted(
        enumerate(found.trials), key=lambda row: (row[1].bits > budget, row[1].objective(found.search), row[0])
    )
    rows = [
        (
            str(number),
            _words(trial),
            "failed" if trial.error else "yes" if trial.bits <= budget else "over",
            f"{trial.bits:.3f}",
            _figure(trial, found),
        )
        for number, trial in ordered
    ]
    failed = [f"\n- {number}: {trial.error}" for number, trial in ordered if trial.error]
    head = ("trial", "setting", f"within {budget}", "bits", found.search.objective)
    return text_table(head, rows, n_words=3) + ("\n\nFailed:\n" + "".join(failed) if failed else "")


def _words(trial: SearchTrial) -> str:
    return ", ".join(f"{name} {value}" for name, value in trial.values.items()) or "as it is"


def _figure(trial: SearchTrial, found: Found) -> str:
    """The objective with its standard error, where that is known."""
    if trial.result is None:
        return "-"
    stderr = trial.result.get(f"{found.search.objective}_stderr")
    return f"{trial.objective(found.search):.5f}" + ("" if stderr is None else f" ± {stderr:.5f}")


def _json(found: Found) -> dict[str, Any]:
    return {
        "search": found.search.model_dump(mode="json"),
        "n_windows": found.n_windows,
        "trials": [_trial_json(trial, found) for trial in found.trials],
        "best": None if found.best is None else _trial_json(found.best, found),
        "held_out": {name: _trial_json(trial, found) for name, trial in found.held_out.items()},
    }


def _trial_json(trial: SearchTrial, found: Found) -> dict[str, Any]:
    within = trial.bits <= found.search.budget_bits
    return {"values": trial.values, "within_budget": within, "result": trial.result, "error": trial.error}
