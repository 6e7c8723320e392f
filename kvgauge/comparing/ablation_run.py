"""Worth of each ingredient of a recipe: the loss with it and without it, on the same windows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from calib.fitting.fit import fit
from calib.recipe.errors import RecipeError
from kvgauge.comparing.ablation import INGREDIENTS, Setup
from kvgauge.running.evaluate_text import tell, warn_of_overlap
from kvgauge.sweeping.cell import Cell
from kvgauge.sweeping.gathering import Gathering
from kvgauge.sweeping.tasks import Bench
from kvgauge.terminal.console import bar
from kvgauge.terminal.text_table import text_table
from simquant import EvalResult
from simquant.evaluate import evaluate_each
from simquant.evaluation.figures import error_text

FULL = "the full recipe"


@dataclass(frozen=True, kw_only=True)
class Worth:
    """An ingredient of a recipe.

    Parameters
    ----------
    ingredient : str
        One of `INGREDIENTS`.
    nats, stderr : float or None
        Rise of the loss per target when it is removed, window by window, and its standard error with windows as the
        independent units; None where it was not measured.
    bits : float or None
        Counted per element without it.
    why_not : str or None
        Why it was not measured.
    """

    ingredient: str
    nats: float | None = None
    stderr: float | None = None
    bits: float | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class Ablation:
    """The full recipe, and each ingredient in the order of the table."""

    full: EvalResult
    worths: Sequence[Worth]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"full": self.full.to_json(), "ingredients": [asdict(worth) for worth in self.worths]}

    def table(self) -> str:
        """For people: what is worth most first, then what is absent."""
        bits = self.full.bits["average"]
        measured = [worth for worth in self.worths if worth.why_not is None]
        rows = [
            (w.ingredient, f"{w.nats:+.5f} ± {error_text(w.stderr, '.5f')}", f"{bits:.3f}", f"{w.bits:.3f}")
            for w in sorted(measured, key=lambda worth: -(worth.nats or 0.0))
        ]
        others = [f"- {worth.ingredient}: {worth.why_not}" for worth in self.worths if worth.why_not is not None]
        head = ("ingredient", "nats that it is worth", "bits with it", "without it")
        return "\n\n".join([text_table(head, rows), *(["Not measured:\n\n" + "\n".join(others)] if others else [])])


def ablate(setup: Setup, model: str, ingredients: Sequence[str]) -> Ablation:
    """Removes one ingredient at a time.

    Parameters
    ----------
    setup : Setup
        The full recipe.
    model : str
        Folder, GGUF file, hub id, `demo` or another known name.
    ingredients : sequence of str
        Of `INGREDIENTS`.

    Raises
    ------
    RecipeError, ValueError
        If the full recipe does not go with the model.
    """
    setups, why_not = {FULL: setup}, {}
    for name in ingredients:
        try:
            found = INGREDIENTS[name](setup)
            if found is None:
                why_not[name] = "absent"
            else:
                setups[name] = found
        except RecipeError as error:
            why_not[name] = f"cannot be removed: {error}"
    benches, unfit = _fitted(setups, model)
    results = _evaluated(benches)
    tell(results[FULL])
    worths = [
        Worth(ingredient=name, why_not=(why_not | unfit)[name])
        if name in why_not | unfit
        else _worth(name, results[FULL], results[name])
        for name in ingredients
    ]
    return Ablation(results[FULL], worths)


def _fitted(setups: Mapping[str, Setup], model: str) -> tuple[dict[str, Bench], dict[str, str]]:
    """Each with its artifact, from one pass over the calibration text for each stage; and why some have none."""
    recipes = [setup.recipe for setup in setups.values()]
    benches: dict[str, Bench] = {}
    unfit: dict[str, str] = {}
    for stage in sorted({recipe.stage for recipe in recipes}):
        source = Gathering.serving(model, setups[FULL].settings, stage, recipes)
        statistics = source.gather(partial(bar, what=f"calibrating, {stage}"))
        for name, setup in ((name, setup) for name, setup in setups.items() if setup.recipe.stage == stage):
            try:
                artifact = fit(statistics, setup.recipe)
            except ValueError as error:
                if name == FULL:
                    raise
                unfit[name] = f"cannot be removed: {error}"
                continue
            cell = Cell(model=model, recipe=setup.recipe, task="perplexity", settings=setup.settings)
            benches[name] = Bench(cell, source.load_model(), artifact)
    return benches, unfit


def _evaluated(benches: Mapping[str, Bench]) -> dict[str, EvalResult]:
    """All on the same windows; those under one policy share the full-precision pass."""
    full = benches[FULL]
    windows = full.windows()
    warn_of_overlap(full.artifact, windows)
    # Full-precision passes depend on windows and policy alone. Setups under the same policy share them; a window or
    # sinks that are removed make another policy.
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, bench in benches.items():
        protocol = bench.protocol()
        own = next((names for known, names in groups if known == protocol), None)
        if own is None:
            groups.append((protocol, own := []))
        own.append(name)
    results: dict[str, EvalResult] = {}
    for protocol, names in groups:
        found = evaluate_each(
            full.loaded.model,
            windows,
            [benches[name].artifact for name in names],
            **protocol,
            batch_size=full.cell.settings.batch_size,
            progress=partial(bar, what=f"evaluating {len(names)} at a time"),
        )
        results |= dict(zip(names, found, strict=True))
    return results


def _worth(name: str, full: EvalResult, removed: EvalResult) -> Worth:
    """The difference within each window: what all windows share, their difficulty, is not in its error."""
    # Var(a - b) = Var(a) + Var(b) - 2 Cov(a, b): windows that are hard for both make the covariance large, so that the
    # paired error is far below that of two separate runs.
    nats, stderr = removed.loss_beyond(full)
    return Worth(
        ingredient=name, nats=nats, stderr=stderr if math.isfinite(stderr) else None, bits=removed.bits["average"]
    )
