"""Run every recipe on every model for every task that a grid file names; or search for the best setting of a recipe.

The grid is a .yaml file with `models`, `recipes` and `tasks`, and options of calibrate and evaluate by name, such as
`nsamples: 16`. Each cell, a recipe on a model for a task, is saved when it is finished; after an interruption the
same command runs the cells that are missing. Paths in the grid are relative to the current folder.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvgauge.cli.options import common as options
from kvgauge.cli.options.common import parsed
from kvgauge.terminal.console import FAILURE, Parser, UsageError, run, say, set_up_logging
from kvgauge.terminal.outputs import output_folder

if TYPE_CHECKING:
    from kvgauge.sweeping.grid import Grid
    from kvgauge.sweeping.run import Runner
    from kvgauge.sweeping.workers import Backend


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid, the workers that run it, and a search where one is asked for.

    Parameters
    ----------
    grid : Path
        A .yaml file.
    output : Path or None
        Folder for cells and results.
    jobs : int
        Cells at a time.
    backend : {'loky', 'dask', 'ray'}
        See `kvgauge.sweeping.workers.Workers`.
    scheduler : str or None
        Address of a Dask cluster.
    search : int or None
        Settings to try; None runs the grid.
    sampler : {'random', 'optuna'}
        Chooses them.
    verbose : bool
        Log what happens.
    """

    grid: Path
    output: Path | None = None
    jobs: int = 1
    backend: "Backend" = "loky"
    scheduler: str | None = None
    search: int | None = None
    sampler: Literal["random", "optuna"] = "random"
    verbose: bool = False


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("kvgauge sweep", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `sweep`."""
    parser = Parser("kvgauge sweep", __doc__)
    parser.add_argument("grid", type=Path, metavar="GRID", help="grid file, .yaml")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder for cells and results (default: runs/sweep-GRID)"
    )
    parser.add_argument("--jobs", type=options.positive, metavar="N", help="cells run in parallel (default: 1)")
    parser.add_argument(
        "--backend",
        choices=("loky", "dask", "ray"),
        help="processes on this machine (loky), or a Dask or Ray cluster (default: loky)",
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="address of a running Dask cluster (default: a new one on this machine)"
    )
    parser.add_argument(
        "--search",
        type=options.positive,
        metavar="N",
        help="instead of the grid: try N settings of the recipe under `search` in the file, within its bit budget",
    )
    parser.add_argument(
        "--sampler", choices=("random", "optuna"), help="choice of the settings to try (default: random)"
    )
    parser.add_argument("--verbose", action="store_true", help="log each step")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _main(argv: list[str]) -> int:
    config = parsed(SweepConfig, parser().parse_args(argv))
    set_up_logging(config.verbose)
    from kvgauge.sweeping.grid import load_grid
    from kvgauge.sweeping.run import Runner
    from kvgauge.sweeping.workers import Workers

    grid = load_grid(config.grid)
    folder = output_folder(config.output or Path("runs") / f"sweep-{config.grid.stem}").resolve()
    command = shlex.join(["kvgauge", "sweep", *argv])
    workers = Workers(jobs=config.jobs, backend=config.backend, scheduler=config.scheduler)
    try:
        with workers.started():
            runner = Runner(folder, workers)
            if config.search:
                return _search(config, config.search, grid, runner, command)
            return _sweep(grid, runner, command)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"Finished cells are in {folder}; the same command goes on with the others.") from error


def _sweep(grid: "Grid", runner: "Runner", command: str) -> int:
    from kvgauge.sweeping.cell import Cell
    from kvgauge.sweeping.report import failures, write_report

    recipes = [choice.resolve() for choice in grid.recipes]
    if not recipes:
        raise UsageError("the grid names no recipe; add recipes: [kvquant-2, kvquant-3]")
    cells = [
        Cell(model=model, recipe=recipe, task=task, settings=grid.settings)
        for model in grid.models
        for recipe in recipes
        for task in grid.single_tasks
    ]
    outcomes = runner.run(cells)
    about = {"command": command, "grid": grid.model_dump(mode="json", exclude={"search"})}
    write_report(runner.folder, about, outcomes)
    print((runner.folder / "summary.md").read_text(encoding="utf-8"), end="")
    say(f"{runner.folder}: summary.json, summary.csv, summary.md, and pareto plots")
    return FAILURE if failures(outcomes) else 0


def _search(config: SweepConfig, n_trials: int, grid: "Grid", runner: "Runner", command: str) -> int:
    from kvgauge.sweeping.search.report import write_search
    from kvgauge.sweeping.search.samplers import OptunaSampler, RandomSampler
    from kvgauge.sweeping.search.search import search

    parameters = grid.search.parameters if grid.search else {}
    sampler = (
        OptunaSampler(parameters, grid.seed, config.jobs)
        if config.sampler == "optuna"
        else RandomSampler(parameters, grid.seed)
    )
    found = search(grid, n_trials, sampler, runner)
    write_search(runner.folder, command, found)
    print((runner.folder / "search.md").read_text(encoding="utf-8"), end="")
    say(f"{runner.folder}: search.json, search.md" + (", best.yaml" if found.best else ""))
    return 0 if "best" in found.held_out and found.held_out["best"].error is None else FAILURE


if __name__ == "__main__":
    sys.exit(main())
