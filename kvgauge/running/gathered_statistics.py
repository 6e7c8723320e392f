"""The statistics that `calibrate` fits from."""

from typing import TYPE_CHECKING

from kvgauge.configuration.calibrate import CalibrateConfig
from kvgauge.configuration.fields import given
from kvgauge.configuration.gather import GatherConfig
from kvgauge.terminal.console import UsageError, bar, say

if TYPE_CHECKING:
    from torch import Tensor

    from calib.recipe.recipe import Recipe
    from calib.statistics.model_statistics import ModelStatistics
    from calib.statistics.site_statistics import Tier
    from kvgauge.loading.models import LoadedModel

_OF_GATHERING = ("dataset", "seqlen", "bos", "nsamples", "shard", "fisher", "save_statistics")
"""Options without effect where statistics are read from files."""


def gathered_statistics(config: CalibrateConfig, recipe: "Recipe") -> "ModelStatistics":
    """From files, or by running the model.

    Raises
    ------
    UsageError
        If the command line asks of files what they cannot give.
    """
    from calib.statistics.model_statistics import ModelStatistics

    if not config.gather.files:
        return _gather(config, recipe)
    _check_not_gathering(config)
    first, *others = config.gather.files
    statistics = ModelStatistics.load(first)
    for path in others:
        statistics.merge(ModelStatistics.load(path))
    return statistics


def _check_not_gathering(config: CalibrateConfig) -> None:
    """Statistics know their model and their windows; a second saying would be ignored.

    Raises
    ------
    UsageError
        If the command line says it nevertheless.
    """
    merged = bool(config.gather.merge)  # merged statistics are new: they may be saved
    source = "--merge" if merged else "--from-statistics"
    names = [name for name in _OF_GATHERING if not (merged and name == "save_statistics")]
    named = [*(["MODEL"] if config.model.model else []), *given(config, names)]
    if named:
        raise UsageError(f"{named[0]} has no effect with {source}; remove it")


def _gather(config: CalibrateConfig, recipe: "Recipe") -> "ModelStatistics":
    """Runs the model. After Ctrl-C the finished windows are kept where --save-statistics says so."""
    from calib.calibration import add_windows, gigabytes, new_statistics
    from calib.capture import site_shapes
    from calib.recipe.layer_choice import check
    from calib.statistics.model_statistics import ModelStatistics
    from calib.text.corpus import check_dataset
    from kvgauge.loading.models import load_model
    from kvgauge.terminal.interrupt import between_items, remaining_windows

    gather = config.gather
    check_dataset(config.text.source)
    loaded = load_model(config.model)
    layers = loaded.layers()
    check(recipe, site_shapes(layers, recipe.stage))
    windows, corpus = _windows(config, loaded)
    if recipe.needs_fisher and not gather.fisher:
        say(f"recipe {recipe.name} needs squared gradients: gathering them, as with --fisher")
    tier: Tier = "full" if recipe.needs_full else gather.statistics
    statistics = new_statistics(
        loaded.model,
        layers,
        stage=recipe.stage,
        tier=tier,
        fisher=gather.fisher or recipe.needs_fisher,
        model_id=loaded.model_id,
        corpus=corpus,
        seed=config.text.seed,
        start_token=loaded.start_token(config.text.bos),
        tokenizer_digest=loaded.tokenizer_digest,
    )
    say(f"statistics ({tier}): {gigabytes(statistics.estimated_bytes())} at most")
    if gather.resume:
        statistics.merge(ModelStatistics.load(gather.resume))
        windows = remaining_windows(windows, statistics, gather.resume)
    try:
        add_windows(loaded.model, layers, statistics, windows, lambda items: between_items(bar(items, "calibrating")))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_resume(gather, statistics)) from error
    return statistics


def _windows(config: CalibrateConfig, loaded: "LoadedModel") -> "tuple[Tensor, str]":
    """The windows to run, those of the shard where there are several; and the name of their text."""
    from calib.text.windows import sample_windows

    text, n_windows = config.text, config.gather.n_windows
    seqlen, start_token = loaded.window_tokens(text.seqlen), loaded.start_token(text.bos)
    corpus = loaded.corpus(text.source, "calibration", text.field)
    windows = sample_windows(corpus, n_windows=n_windows, seqlen=seqlen, seed=text.seed, start_token=start_token)
    if config.gather.shard:
        number, total = config.gather.shard
        # All shards draw the same windows from one seed and take turns: together they are the run without shards.
        windows = windows[number - 1 :: total]
        if not len(windows):
            raise UsageError(
                f"--shard {number}/{total}: no window is left of {n_windows}; use at most {n_windows} shards"
            )
    return windows, corpus.name


def _how_to_resume(config: GatherConfig, statistics: "ModelStatistics") -> str:
    path = config.save_statistics
    if path is None:
        return "Nothing was written. With --save-statistics FILE an interrupted run can go on where it stopped."
    if not statistics.is_whole:
        return "Stopped within a window: nothing was written."
    statistics.save(path)
    return (
        f"{len(statistics.windows)} of {config.n_windows} windows are in {path}. Go on with "
        f"the same command and --resume {path} --force"
    )
