"""Everything that a report shows, as JSON values."""

import math
from collections.abc import Mapping
from typing import Any

from kvgauge.report.compared import compared
from kvgauge.report.findings.site_findings import FIRST_POSITIONS, Seen, drift, look, site_rows
from kvgauge.report.findings.value_views import value_views, worst_sites
from kvgauge.report.memory import memory
from kvgauge.report.origins import origins
from kvgauge.report.reported_run import ReportedRun
from kvgauge.report.verdict import verdict

FORMAT = "kvgauge.report"
VERSION = 2


def gather(run: ReportedRun) -> dict[str, Any]:
    """The figures of a report: those of the run, and what a look at single layers and their values adds.

    Raises
    ------
    UsageError
        If the file to compare with is not what `compare_recipes` writes.
    """
    result = next(iter(run.results.values()), None)
    others = None if run.compared is None else compared(run.compared, result)
    layers = run.loaded.layers()
    seen = look(run, layers)
    rows = site_rows(run, layers, seen)
    chosen = worst_sites(rows)
    found = {
        "format": FORMAT,
        "version": VERSION,
        "command": run.command,
        "origins": origins(run),
        "texts": {name: {**own, "perplexity_rise": _rise(own)} for name, own in run.results.items()},
        "tasks": dict(run.tasks),
        "lm_eval": run.lm_eval,
        "policy": run.settings["policy"].describe(),
        "sink_tokens": run.settings["policy"].sink_tokens,
        "sites": rows,
        "chosen_sites": [str(site) for site in chosen],
        "norms": _norms(seen),
        "kept_by_channel": {
            str(site): (seen.kept[site] / seen.n_windows).tolist() for site in chosen if site in seen.kept
        },
        "drift": drift(run, rows),
        "memory": [] if result is None else memory(result, run.quantizers),
        "comparison": others,
        **value_views(run, layers, chosen),
    }
    found = _finite(found)
    return {**found, "verdict": verdict(found)}


def _rise(result: Mapping[str, Any]) -> float | None:
    before, after = result["fp"]["perplexity"], result["quantized"]["perplexity"]
    return None if before is None or after is None else after / before - 1


def _norms(seen: Seen) -> dict[str, dict[str, Any]]:
    """The median over later positions, and the first positions as multiples of it; means over windows."""
    found = {}
    for site, sums in seen.norms.items():
        norms = sums / seen.n_windows
        later = norms[FIRST_POSITIONS:] if len(norms) > FIRST_POSITIONS else norms
        median = float(later.median())
        first = (norms[:FIRST_POSITIONS] / median).tolist() if median else []
        found[str(site)] = {"later_median": median, "first_over_later": first}
    return found


def _finite(value: Any) -> Any:
    """What is no finite number becomes None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
