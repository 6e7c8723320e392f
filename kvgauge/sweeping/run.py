"""Cells on their way to results: finished ones are kept, and not run again."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from artifacts.artifact import Artifact
from calib.fitting.fit import fit
from calib.recipe.recipe import Recipe
from calib.statistics.model_statistics import ModelStatistics
from kvgauge.sweeping.cell import Cell, read_cell, write_cell
from kvgauge.sweeping.gathering import Gathering
from kvgauge.sweeping.tasks import TASKS, Bench
from kvgauge.sweeping.workers import Workers
from kvgauge.terminal.console import say


@dataclass(frozen=True)
class Outcome:
    """Outcome of a cell: a result, or the error that stands in its place."""

    cell: Cell
    result: dict[str, Any] | None
    error: str | None


@dataclass(frozen=True)
class Runner:
    """Runs cells, and keeps what they give in a folder.

    Parameters
    ----------
    folder : Path
        For `cells/` and `statistics/`; every worker must see it.
    workers : Workers
        Already started.
    """

    folder: Path
    workers: Workers

    def run(self, cells: Sequence[Cell]) -> list[Outcome]:
        """An outcome for each cell, in their order; one that failed before is tried again."""
        for name in ("cells", "statistics"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        named = {cell.name: cell for cell in cells}
        results = {name: read_cell(self._path(name)) for name in named}
        left = [name for name, result in results.items() if result is None]
        say(f"{len(named) - len(left)} of {len(named)} cells are finished, {len(left)} to do")
        errors = self._run([named[name] for name in left], named.values())
        results |= {name: read_cell(self._path(name)) for name in left if name not in errors}
        return [self._outcome(cell, results[cell.name], errors.get(cell.name)) for cell in cells]

    def _outcome(self, cell: Cell, result: dict[str, Any] | None, error: str | None) -> Outcome:
        if result is None and error is None:
            error = f"nothing was left at {self._path(cell.name)}: do the workers see this folder?"
        return Outcome(cell, result, error)

    def _path(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"

    def _run(self, cells: Sequence[Cell], together: Collection[Cell]) -> dict[str, str]:
        """Errors of the cells that failed, by their names."""
        # Statistics first, each once, then the cells: recipes with keys from the same stage share a model's statistics.
        sources = [_gathering(cell, together) for cell in cells]
        folder = self.folder / "statistics"
        missing = [source for source in dict.fromkeys(sources) if not source.is_kept(folder)]
        keep = partial(Gathering.keep, folder=folder)
        failed = dict(zip(missing, self.workers.errors(keep, missing, "calibrating"), strict=True))
        ready = [(cell, source) for cell, source in zip(cells, sources, strict=True) if failed.get(source) is None]
        found = self.workers.errors(partial(finish, self.folder), ready, "cells")
        errors = {cell.name: failed.get(source) for cell, source in zip(cells, sources, strict=True)}
        errors |= {cell.name: error for (cell, _), error in zip(ready, found, strict=True)}
        return {name: error for name, error in errors.items() if error is not None}


def finish(folder: Path, job: tuple[Cell, Gathering]) -> None:
    """Runs a cell whose statistics are at hand, and keeps its result.

    Parameters
    ----------
    folder : Path
        Of the sweep.
    job : tuple of Cell and Gathering
        The cell and its statistics.
    """
    cell, source = job
    path = folder / "cells" / f"{cell.name}.json"
    if path.exists() and read_cell(path) is not None:  # when a worker's death made it run twice
        return
    artifact = _fitted(source.path(folder / "statistics"), cell.recipe.model_dump_json())
    identity = cell.identity()  # before it is run: a text may be edited meanwhile
    bench = Bench(cell, source.load_model(), artifact, path.with_suffix(".jsonl"))
    write_cell(path, identity, TASKS[cell.task].run(bench))


def _gathering(cell: Cell, together: Collection[Cell]) -> Gathering:
    """The statistics of a cell, which serve all cells that take keys at the same place of the model."""
    recipes = [other.recipe for other in together if other.model == cell.model]
    return Gathering.serving(cell.model, cell.settings, cell.recipe.stage, recipes)


# One at a time: statistics of a large model take gigabytes, and cells with the same ones follow each other.
@lru_cache(maxsize=1)
def _statistics(path: Path) -> ModelStatistics:
    return ModelStatistics.load(path)


@lru_cache(maxsize=1)
def _fitted(path: Path, recipe: str) -> Artifact:
    """Fitted once for several tasks in a row."""
    return fit(_statistics(path), Recipe.model_validate_json(recipe))
