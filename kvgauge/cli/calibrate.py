"""Run a model over a text once, fit quantizers for its keys and values, and write them to one file."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvgauge.cli.options import common as options
from kvgauge.cli.options.common import parsed
from kvgauge.cli.options.recipe import add_recipe_options
from kvgauge.configuration.calibrate import CalibrateConfig
from kvgauge.configuration.gather import NSAMPLES
from kvgauge.configuration.model import short_name
from kvgauge.configuration.recipe import recipe_changes
from kvgauge.running.gathered_statistics import gathered_statistics
from kvgauge.terminal.console import Parser, bar, run, set_up_logging
from kvgauge.terminal.outputs import check_outputs, default_output

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from calib.recipe.recipe import Recipe
    from calib.statistics.model_statistics import ModelStatistics


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("calibrate", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `calibrate`."""
    parser = Parser("calibrate", __doc__, epilog="Then: evaluate MODEL --quantizer-path FILE")
    options.add_model_options(parser)
    options.add_text_options(parser)
    add_recipe_options(parser, "default")
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--nsamples", type=options.positive, metavar="N", help=f"calibration windows (default: {NSAMPLES})"
    )
    group.add_argument(
        "--statistics",
        choices=("basic", "full"),
        help="statistics to gather; full serves every recipe and takes more memory (default: what the recipe needs)",
    )
    group.add_argument(
        "--fisher", action="store_true", help="also gather squared gradients (Fisher); one backward pass per window"
    )
    group.add_argument(
        "--jobs",
        type=options.positive,
        metavar="N",
        help="layers' keys and values fitted in parallel (default: number of cores)",
    )
    _add_output_options(parser)
    _add_statistics_options(parser)
    group = parser.add_argument_group("print and stop")
    group.add_argument("--print-recipe", action="store_true", help="print the recipe with all changes applied")
    group.add_argument("--list-recipes", action="store_true", help="print the shipped recipes")
    group.add_argument("--list-sites", action="store_true", help="print which layers of MODEL can be quantized")
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds the file to write."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--quantizer-path",
        type=Path,
        metavar="FILE",
        help="artifact to write, .safetensors or .pkl (default: a name under runs/, which is printed)",
    )
    group.add_argument("--force", action="store_true", help="replace existing output files")


def _add_statistics_options(parser: argparse.ArgumentParser) -> None:
    """Adds files of statistics: to write, to read, to merge, to go on from."""
    group = parser.add_argument_group("saved statistics (to fit other recipes, to split a run, to resume it)")
    group.add_argument("--save-statistics", type=Path, metavar="FILE", help="also save the gathered statistics")
    group.add_argument(
        "--from-statistics", type=Path, metavar="FILE", help="fit from saved statistics; the model is not loaded"
    )
    group.add_argument(
        "--shard", type=options.shard, metavar="I/N", help="gather every N-th window only, starting with the I-th"
    )
    group.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="fit from the merged statistics of all shards"
    )
    group.add_argument(
        "--resume", type=Path, metavar="FILE", help="go on from the statistics that an interrupted run saved"
    )


def _main(argv: list[str]) -> int:
    config = parsed(CalibrateConfig, parser().parse_args(argv))
    set_up_logging(config.verbose)
    # Imports inside functions, here and in the other programs: torch and transformers take seconds to import, which
    # --help and a wrong option should not cost.
    from calib.recipe.recipe import load_recipe, shipped_recipes

    if config.list_recipes:
        width = max(map(len, shipped_recipes()))
        print("\n".join(f"{name:{width}}  {load_recipe(name).source}" for name in shipped_recipes()))
        return 0
    recipe = load_recipe(config.recipe.recipe or "default")
    recipe = recipe.edited(recipe_changes(config.recipe, recipe.model_dump(mode="json")))
    if config.print_recipe:
        print(recipe.to_yaml(), end="")
        return 0
    if not config.gather.files:
        config = config.of_model()
    return _list_sites(config) if config.list_sites else _calibrate(config, recipe)


def _calibrate(config: CalibrateConfig, recipe: "Recipe") -> int:
    """Statistics, and what is fitted to them; of a shard the statistics alone."""
    saved = config.gather.save_statistics
    shard = config.gather.shard if config.quantizer_path is None else None
    if saved and shard:
        check_outputs(saved, None, force=config.force)
        statistics = gathered_statistics(config, recipe)
        statistics.save(saved)
        print(f"{saved}: {len(statistics.windows)} windows, shard {shard[0]} of {shard[1]}")
        print("Next, with the statistics of all shards: calibrate --merge FILE FILE ... --quantizer-path q.safetensors")
        return 0
    source = short_name(config.model.model) if config.model.model else "statistics"
    output = config.quantizer_path or default_output(source, recipe)
    check_outputs(output, saved, force=config.force)
    statistics = gathered_statistics(config, recipe)
    if saved:
        statistics.save(saved)
    return _fit(config, recipe, statistics, output)


def _fit(config: CalibrateConfig, recipe: "Recipe", statistics: "ModelStatistics", output: Path) -> int:
    from artifacts.artifact import save
    from calib.fitting.fit import fit

    jobs = config.jobs and min(config.jobs, os.cpu_count() or 1)
    artifact = fit(statistics, recipe, jobs=jobs, progress=lambda fits: bar(fits, "fitting"))
    save(artifact, output)
    print(_summary(artifact, output))
    model = config.model.model or artifact.manifest.model_id or "MODEL"
    print(f"Next: {shlex.join(['evaluate', model, '--quantizer-path', str(output)])}")
    return 0


def _summary(artifact: "Artifact", output: Path) -> str:
    static = sum(quantizer.static_bytes for quantizer in artifact.values())
    kinds: dict[str, int] = {}
    for site, quantizer in artifact.items():
        row = f"{site.tensor}: {quantizer.spec.describe()}"
        kinds[row] = kinds.get(row, 0) + 1
    rows = [f"  {count} x {row}" for row, count in kinds.items()]
    corpus, choice = artifact.manifest.corpus, artifact.manifest.sink_choice
    return "\n".join(
        [
            f"{output}: {len(artifact)} sites, {static} static bytes, from {corpus.n_tokens} tokens of {corpus.name}",
            *rows,
            *([] if choice is None else [f"  sinks: {choice.reason}"]),
        ]
    )


def _list_sites(config: CalibrateConfig) -> int:
    from artifacts.model.attention import site_table
    from kvgauge.loading.models import load_model

    for row in site_table(load_model(config.model).model):
        shape = f"{row.kv_heads} x {row.head_dim}" if row.kv_heads else "-"
        print(f"{row.layer:5}  {row.status:8} {shape:10} {' '.join(row.hooks) or '-':34} {row.why}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
