"""The best setting of a recipe's parameters within a bit budget, and what it is worth on windows that chose nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from artifacts.errors import InvalidValueError
from calib.recipe.errors import RecipeError
from calib.recipe.recipe import Recipe
from kvgauge.sweeping.cell import Cell
from kvgauge.sweeping.grid import Grid
from kvgauge.sweeping.run import Outcome, Runner
from kvgauge.sweeping.search.samplers import Sampler, Score, Values
from kvgauge.sweeping.search.space import Search
from kvgauge.terminal.console import UsageError


@dataclass(frozen=True)
class SearchTrial:
    """A setting, the recipe that it makes, and the figures of `evaluate`; or the error that stands in their place."""

    values: Values
    recipe: Recipe | None
    result: dict[str, Any] | None
    error: str | None

    @property
    def bits(self) -> float:
        """Counted per element, the mean of keys and values, exact tokens included."""
        return float(self.result["bits"]["average"]) if self.result else math.inf

    def objective(self, search: Search) -> float:
        """Less is better; infinite where there is no finite figure."""
        found = self.result[search.objective] if self.result else None
        return math.inf if found is None else float(found)

    def score(self, search: Search) -> Score | None:
        """For the sampler."""
        objective = self.objective(search)
        return Score(objective, self.bits - search.budget_bits) if math.isfinite(objective) else None


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Parameters
    ----------
    search : Search
        What was looked for.
    n_windows : int
        That chose, and as many that were held out.
    trials : sequence of SearchTrial
        The recipe as it is, then all that was tried, in order; on the windows that choose.
    best : SearchTrial or None
        The least objective within the budget.
    held_out : mapping from str to SearchTrial
        The recipe as it is, and the best, on the windows that were held out.
    """

    search: Search
    n_windows: int
    trials: Sequence[SearchTrial]
    best: SearchTrial | None
    held_out: dict[str, SearchTrial]


@dataclass(frozen=True)
class _Bench:
    """Runs trials of a grid on one part of the windows."""

    grid: Grid
    runner: Runner
    first_window: int = 0

    def run(self, settings: Sequence[Values]) -> list[SearchTrial]:
        assert self.grid.search is not None
        recipes = [_changed(self.grid.search, values) for values in settings]
        possible = [recipe for recipe in recipes if isinstance(recipe, Recipe)]
        outcomes = iter(self.runner.run([self._cell(recipe) for recipe in possible]) if possible else [])
        return [
            _trial(values, next(outcomes)) if isinstance(recipe, Recipe) else SearchTrial(values, None, None, recipe)
            for values, recipe in zip(settings, recipes, strict=True)
        ]

    def _cell(self, recipe: Recipe) -> Cell:
        [model] = self.grid.models
        settings, first = self.grid.settings, self.first_window
        return Cell(model=model, recipe=recipe, task="perplexity", settings=settings, first_window=first)


def search(grid: Grid, n_trials: int, sampler: Sampler, runner: Runner) -> Found:
    """Tries settings on the first `limit` windows; scores the best, and the recipe as it is, on the `limit` after them.

    Parameters
    ----------
    grid : Grid
        With one model, a `search`, and a `limit`.
    n_trials : int
        Settings to try besides the recipe as it is.
    sampler : Sampler
        Chooses them.
    runner : Runner
        Runs their cells.

    Raises
    ------
    UsageError
        If the grid is not for a search.
    ValueError
        If the recipe as it is cannot be scored on both parts of the windows.
    """
    wanted, n_windows = _checked(grid)
    # The least of many noisy losses is too low, the more so the more are tried (the winner's curse). The windows that
    # choose are therefore not those of the final figure.
    chooses, reports = _Bench(grid, runner), _Bench(grid, runner, first_window=n_windows)
    [base], [base_held_out] = chooses.run([{}]), reports.run([{}])
    for trial in (base_held_out, base):
        if trial.error:
            raise InvalidValueError(f"search: {wanted.recipe} cannot be scored unchanged: {trial.error}")
    trials = [base]
    while len(trials) <= n_trials and (settings := sampler.ask(n_trials + 1 - len(trials))):
        tried = chooses.run(settings)
        sampler.tell([trial.score(wanted) for trial in tried])
        trials += tried
    best = _best(trials, wanted)
    held_out = {"as it is": base_held_out}
    if best is not None:
        [held_out["best"]] = reports.run([best.values])
    return Found(wanted, n_windows, trials, best, held_out)


def _checked(grid: Grid) -> tuple[Search, int]:
    if grid.search is None:
        raise UsageError(
            "--search: the grid has no entry search; add search: {recipe: ..., parameters: ..., budget_bits: ...}"
        )
    if len(grid.models) != 1:
        raise UsageError(f"--search: expected one model in the grid; got {len(grid.models)}: {', '.join(grid.models)}")
    if grid.limit is None:
        raise UsageError("--search: the grid needs limit: N, the windows that choose the setting; N more are held out")
    return grid.search, grid.limit


def _changed(wanted: Search, values: Values) -> Recipe | str:
    """The recipe, or why there is none: values that are possible one by one may not go together."""
    try:
        return wanted.changed(values)
    except RecipeError as error:
        return str(error)


def _trial(values: Values, outcome: Outcome) -> SearchTrial:
    return SearchTrial(values, outcome.cell.recipe, outcome.result, outcome.error)


def _best(trials: Sequence[SearchTrial], wanted: Search) -> SearchTrial | None:
    within = [trial for trial in trials if trial.bits <= wanted.budget_bits and trial.score(wanted) is not None]
    return min(within, key=lambda trial: (trial.objective(wanted), trial.bits), default=None)
