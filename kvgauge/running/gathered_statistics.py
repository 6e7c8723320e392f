"""The statistics that `calibrate` fits from."""

import argparse
from typing import TYPE_CHECKING

from kvgauge.cli.options.common import NSAMPLES
from kvgauge.terminal.console import UsageError, bar, say

if TYPE_CHECKING:
    from calib.recipe.recipe import Recipe
    from calib.statistics.model_statistics import ModelStatistics
    from calib.statistics.site_statistics import Tier


def gathered_statistics(args: argparse.Namespace, recipe: "Recipe") -> "ModelStatistics":
    """From files, or by running the model.

    Raises
    ------
    UsageError
        If the command line names several sources, or asks of files what they cannot give.
    """
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
    gathering = ("model", "dataset", "seqlen", "bos", "nsamples", "shard", "fisher", *saved)
    given = [name for name in gathering if getattr(args, name)]
    if given:
        name = "MODEL" if given[0] == "model" else f"--{given[0]}".replace("_", "-")
        raise UsageError(
            f"--{source.replace('_', '-')} fits from what was gathered before, which {name} cannot change; drop {name}"
        )


def _gather(args: argparse.Namespace, recipe: "Recipe") -> "ModelStatistics":
    """Runs the model. After Ctrl-C the finished windows are kept where --save-statistics says so."""
    from calib.calibration import add_windows, gigabytes, new_statistics
    from calib.capture import site_shapes
    from calib.recipe.layer_choice import check
    from calib.statistics.model_statistics import ModelStatistics
    from calib.text.corpus import check_dataset
    from calib.text.windows import sample_windows
    from kvgauge.loading.models import load_model
    from kvgauge.terminal.interrupt import between_items, remaining_windows

    n_windows = args.nsamples or NSAMPLES
    check_dataset(args.dataset)
    loaded = load_model(args)
    layers = loaded.layers()
    check(recipe, site_shapes(layers, recipe.stage))
    seqlen = loaded.window_tokens(args.seqlen)
    start_token = loaded.start_token(args.bos)
    corpus = loaded.corpus(args.dataset, "calibration", args.field)
    windows = sample_windows(corpus, n_windows=n_windows, seqlen=seqlen, seed=args.seed, start_token=start_token)
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
        "start_token": start_token,
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
    if not statistics.is_whole:
        return "Stopped within a window: nothing was written."
    statistics.save(args.save_statistics)
    return (
        f"{len(statistics.windows)} of {args.nsamples or NSAMPLES} windows are in {args.save_statistics}. Go on with "
        f"the same command and --resume {args.save_statistics} --force"
    )
