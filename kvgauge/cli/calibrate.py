"""`calibrate`: runs a model over some text once, fits quantizers, writes them to one file."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvgauge.cli.options import common as options
from kvgauge.cli.options.recipe import add_recipe_options, recipe_changes
from kvgauge.running.gathered_statistics import gathered_statistics
from kvgauge.terminal.console import Parser, bar, run, set_up_logging
from kvgauge.terminal.outputs import check_outputs, output_path

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from calib.recipe.recipe import Recipe
    from calib.statistics.model_statistics import ModelStatistics


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("calibrate", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `calibrate`."""
    parser = Parser("calibrate", __doc__, epilog="Next: evaluate MODEL --quantizer-path FILE")
    options.add_model_options(parser)
    options.add_text_options(parser)
    add_recipe_options(parser, "default")
    parser.add_argument(
        "--nsamples", type=options.positive, metavar="N", help=f"calibration windows (default: {options.NSAMPLES})"
    )
    parser.add_argument(
        "--quantizer-path", type=Path, metavar="FILE", help=".safetensors or .pkl (default: under runs/)"
    )
    parser.add_argument("--force", action="store_true", help="replace existing output files")
    parser.add_argument(
        "--jobs",
        type=options.positive,
        metavar="N",
        help="sites fitted at a time, or threads for one, at most one for each core (default: the cores)",
    )
    parser.add_argument(
        "--statistics",
        choices=("basic", "full"),
        default="basic",
        help="what to gather (default: what the recipe reads)",
    )
    parser.add_argument(
        "--fisher", action="store_true", help="weigh by squared gradients: one backward pass per window"
    )
    parser.add_argument(
        "--save-statistics", type=Path, metavar="FILE", help="keep the statistics, to fit again or merge"
    )
    parser.add_argument(
        "--from-statistics", type=Path, metavar="FILE", help="fit from saved statistics, without the model"
    )
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="fit from the statistics of several shards"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from the statistics of an interrupted run")
    parser.add_argument("--shard", type=options.shard, metavar="I/N", help="take every N-th window, from the I-th")
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe, flags included, and stop")
    parser.add_argument("--list-recipes", action="store_true", help="print the shipped recipes and stop")
    parser.add_argument("--list-sites", action="store_true", help="print which layers of MODEL can be handled and stop")
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    set_up_logging(args.verbose)
    from calib.recipe.recipe import load_recipe, shipped_recipes

    if args.list_recipes:
        width = max(map(len, shipped_recipes()))
        print("\n".join(f"{name:{width}}  {load_recipe(name).source}" for name in shipped_recipes()))
        return 0
    recipe = load_recipe(args.recipe or "default")
    recipe = recipe.edited(recipe_changes(args, recipe.model_dump(mode="json")))
    if args.print_recipe:
        print(recipe.to_yaml(), end="")
        return 0
    if not (args.from_statistics or args.merge):
        options.choose_defaults(args)
    if args.list_sites:
        return _list_sites(args)
    part = bool(args.shard and args.save_statistics and not args.quantizer_path)
    output = args.save_statistics if part else output_path(args, recipe)
    check_outputs(output, None if part else args.save_statistics, force=args.force)
    statistics = gathered_statistics(args, recipe)
    if args.save_statistics:
        statistics.save(args.save_statistics)
    return _report_part(args, statistics) if part else _fit(args, recipe, statistics, output)


def _fit(args: argparse.Namespace, recipe: "Recipe", statistics: "ModelStatistics", output: Path) -> int:
    from artifacts.artifact import save
    from calib.fitting.fit import fit

    jobs = args.jobs and min(args.jobs, os.cpu_count() or 1)
    artifact = fit(statistics, recipe, jobs=jobs, progress=lambda fits: bar(fits, "fitting"))
    save(artifact, output)
    print(_summary(artifact, output))
    model = args.model or artifact.manifest.model_id or "MODEL"
    print(f"Next: {shlex.join(['evaluate', model, '--quantizer-path', str(output)])}")
    return 0


def _report_part(args: argparse.Namespace, statistics: "ModelStatistics") -> int:
    """One of several shards has no artifact of its own."""
    number, total = args.shard
    print(f"{args.save_statistics}: {len(statistics.windows)} windows, shard {number} of {total}")
    print("Next, with the statistics of all shards: calibrate --merge FILE FILE ... --quantizer-path q.safetensors")
    return 0


def _summary(artifact: "Artifact", output: Path) -> str:
    static = sum(quantizer.static_bytes for quantizer in artifact.values())
    kinds: dict[str, int] = {}
    for site, quantizer in artifact.items():
        row = f"{site.tensor}: {quantizer.spec.describe()}"
        kinds[row] = kinds.get(row, 0) + 1
    rows = [f"  {count} x {row}" for row, count in kinds.items()]
    corpus = artifact.manifest.corpus
    return "\n".join(
        [
            f"{output}: {len(artifact)} sites, {static} static bytes, from {corpus.n_tokens} tokens of {corpus.name}",
            *rows,
        ]
    )


def _list_sites(args: argparse.Namespace) -> int:
    from artifacts.model.attention import site_table
    from kvgauge.loading.models import load_model

    for row in site_table(load_model(args).model):
        shape = f"{row.kv_heads} x {row.head_dim}" if row.kv_heads else "-"
        print(f"{row.layer:5}  {row.status:8} {shape:10} {' '.join(row.hooks) or '-':34} {row.why}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
