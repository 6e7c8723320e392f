"""`calibrate`: runs a model over some text once, fits quantizers, writes them to one file."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scripts import options
from scripts.console import Parser, UsageError, bar, run, say, set_up_logging
from scripts.outputs import check_outputs, output_path

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from calib.recipe import Recipe
    from calib.statistics.model_statistics import ModelStatistics
    from calib.statistics.site_statistics import Tier

NSAMPLES = 16


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("calibrate", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `calibrate`."""
    parser = Parser("calibrate", __doc__, epilog="Next: evaluate MODEL --quantizer-path FILE")
    options.add_model_options(parser)
    options.add_text_options(parser)
    options.add_recipe_options(parser, "default")
    parser.add_argument(
        "--nsamples", type=options.positive, metavar="N", help=f"calibration windows (default: {NSAMPLES})"
    )
    parser.add_argument(
        "--quantizer-path", type=Path, metavar="FILE", help=".safetensors or .pkl (default: under runs/)"
    )
    parser.add_argument("--force", action="store_true", help="replace existing output files")
    parser.add_argument(
        "--jobs",
        type=options.positive,
        default=1,
        metavar="N",
        help="sites fitted at a time, at most one for each core (default: 1)",
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
    from calib.recipe import load_recipe, shipped_recipes

    if args.list_recipes:
        width = max(map(len, shipped_recipes()))
        print("\n".join(f"{name:{width}}  {load_recipe(name).source}" for name in shipped_recipes()))
        return 0
    recipe = load_recipe(args.recipe or "default")
    recipe = recipe.edited(options.recipe_changes(args, recipe.model_dump(mode="json")))
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
    statistics = _statistics(args, recipe)
    if args.save_statistics:
        statistics.save(args.save_statistics)
    return _report_part(args, statistics) if part else _fit(args, recipe, statistics, output)


def _fit(args: argparse.Namespace, recipe: "Recipe", statistics: "ModelStatistics", output: Path) -> int:
    from artifacts.artifact import save
    from calib.fitting import fit

    jobs = min(args.jobs, os.cpu_count() or 1)
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


def _statistics(args: argparse.Namespace, recipe: "Recipe") -> "ModelStatistics":
    from calib.statistics.model_statistics import ModelStatistics

    sources = [name for name in ("from_statistics", "merge", "resume") if getattr(args, name)]
    if len(sources) > 1:
        raise UsageError(f"--{sources[0]} and --{sources[1]} exclude each other".replace("_", "-"))
    if args.from_statistics or args.merge:
        _check_not_gathering(args, sources[0])
        first, *others = args.merge or [args.from_statistics]
        statistics = ModelStatistics.load(first)
        for path in others:
            statistics.merge(ModelStatistics.load(path))
        return statistics
    return _gather(args, recipe)


def _check_not_gathering(args: argparse.Namespace, source: str) -> None:
    """Statistics know their model and their windows; a second saying would be ignored.

    Raises
    ------
    UsageError
        If the command line says it nevertheless.
    """
    saved = () if args.merge else ("save_statistics",)
    given = [
        name for name in ("model", "dataset", "seqlen", "nsamples", "shard", "fisher", *saved) if getattr(args, name)
    ]
    if given:
        name = "MODEL" if given[0] == "model" else f"--{given[0]}".replace("_", "-")
        raise UsageError(
            f"--{source.replace('_', '-')} fits from what was gathered before, which {name} cannot change; drop {name}"
        )


def _gather(args: argparse.Namespace, recipe: "Recipe") -> "ModelStatistics":
    """Runs the model. After Ctrl-C the finished windows are kept where --save-statistics says so."""
    from calib.calibration import add_windows, gigabytes, new_statistics
    from calib.capture import site_shapes
    from calib.corpus import check_dataset, load_corpus
    from calib.layer_choice import check
    from calib.statistics.model_statistics import ModelStatistics
    from calib.windows import sample_windows
    from scripts.interrupt import between_items, remaining_windows
    from scripts.models import load_model

    n_windows = args.nsamples or NSAMPLES
    check_dataset(args.dataset)
    loaded = load_model(args)
    layers = loaded.layers()
    check(recipe, site_shapes(layers, recipe.stage))
    seqlen = loaded.window_tokens(args.seqlen)
    corpus = load_corpus(args.dataset, "calibration", loaded.encode, field=args.field)
    windows = sample_windows(corpus, n_windows=n_windows, seqlen=seqlen, seed=args.seed)
    if args.shard:
        number, total = args.shard
        windows = windows[number - 1 :: total]
        if not len(windows):
            raise UsageError(
                f"--shard {number}/{total} of {n_windows} windows is empty; use at most {n_windows} shards"
            )
    origin = {
        "model_id": loaded.model_id,
        "corpus": corpus.name,
        "seed": args.seed,
        "tokenizer_digest": loaded.tokenizer_digest,
    }
    if recipe.needs_fisher and not args.fisher:
        say(f"recipe {recipe.name} reads squared gradients: taking them, as with --fisher")
    fisher = args.fisher or recipe.needs_fisher
    tier: Tier = "full" if recipe.needs_full else args.statistics
    statistics = new_statistics(loaded.model, layers, stage=recipe.stage, tier=tier, fisher=fisher, **origin)
    say(f"statistics ({tier}): {gigabytes(statistics.estimated_bytes())} at most")
    if args.resume:
        statistics.merge(ModelStatistics.load(args.resume))
        windows = remaining_windows(windows, statistics, args.resume)
    try:
        add_windows(loaded.model, layers, statistics, windows, lambda items: between_items(bar(items, "calibrating")))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_resume(args, statistics)) from error
    return statistics


def _how_to_resume(args: argparse.Namespace, statistics: "ModelStatistics") -> str:
    if not args.save_statistics:
        return "Nothing was written. With --save-statistics FILE an interrupted run can go on where it stopped."
    statistics.save(args.save_statistics)
    return (
        f"{len(statistics.windows)} of {args.nsamples or NSAMPLES} windows are in {args.save_statistics}. Go on with "
        f"the same command and --resume {args.save_statistics} --force"
    )


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
    from artifacts.attention import site_table
    from scripts.models import load_model

    for row in site_table(load_model(args).model):
        shape = f"{row.kv_heads} x {row.head_dim}" if row.kv_heads else "-"
        print(f"{row.layer:5}  {row.status:8} {shape:10} {' '.join(row.taps) or '-':34} {row.why}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
