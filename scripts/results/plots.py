"""Pictures of the documentation, drawn from the results."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.results.kinds import figure
from scripts.results.schema import Figures, Results, ResultsError

_AXES = ("bits.average", "loss_nats", "loss_nats_stderr")

PLOTS: Mapping[str, str] = {
    f"pareto-{model}.svg": f"compare-{model}" for model in ("demo", "stories260k", "smollm2", "gemma3-270m")
}
"""Files under docs/ and the results that they show."""


def pareto_svg(results: Results) -> bytes:
    """Nats lost over bits; the same results give the same bytes.

    Raises
    ------
    ResultsError
        If a row lacks one of the figures.
    """
    from kvgauge.terminal.pareto import Point, save_pareto

    points = [Point(row.name, *(_number(row.figures, path) for path in _AXES)) for row in results.rows]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pareto.svg"
        save_pareto(points, _title(results), path)
        return path.read_bytes()


def _number(figures: Figures, path: str) -> float:
    """A figure that must be there."""
    value = figure(figures, path)
    if not isinstance(value, int | float):
        raise ResultsError(f"a plot needs the figure {path}; got {value!r}")
    return float(value)


def _title(results: Results) -> str:
    about = results.conditions_of(results.rows[0])
    return f"{about.model} (perplexity {_number(results.figures, 'perplexity'):.4f}), {about.text}"
