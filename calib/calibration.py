"""Calibration in one call: one pass over the text, then a fit, with an artifact as the result."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import psutil
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.manifest import tool_version
from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.model.evidence import text_config
from artifacts.model.fingerprint import model_fingerprint
from artifacts.model.hooks import evaluating
from artifacts.sites import Stage
from calib.capture import collect, single_windows, site_shapes
from calib.fitting.fit import Progress, fit
from calib.recipe.layer_choice import check
from calib.recipe.recipe import Recipe, chosen_recipe
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.origin import Origin
from calib.statistics.site_statistics import Tier
from calib.text.sketches import NGRAM_TOKENS, merge_sketches, ngram_sketch
from calib.text.windows import check_vocabulary

_LOG = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    recipe: str | Recipe = "default",
    *,
    bits: int | None = None,
    tier: Tier = "basic",
    fisher: bool = False,
) -> Artifact:
    """Fits quantizers for the key-value cache of a model: `gather`, then `fit`.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    windows : Int64[Tensor, "windows tokens"]
        Token ids of the calibration text, without padding.
    recipe : str or Recipe
        A shipped recipe's name, a recipe file, or a recipe.
    bits : int or None
        Code width for keys and values; None leaves it to the recipe.
    tier : {'basic', 'full'}
        Which statistics to take; `full` where the recipe reads them.
    fisher : bool
        Gather squared gradients too: one backward pass per window. Recipes that read them turn it on.

    Returns
    -------
    Artifact
        Fitted quantizers, for `artifacts.save` and `simquant.simulate`.

    Raises
    ------
    RecipeError
        If the recipe cannot be read, or does not go with the model's shape.
    CorpusError
        If a token id is beyond the model's vocabulary.
    UnsupportedModelError
        If a layer cannot be handled, with the reason.
    NonFiniteError
        If activations hold NaN or infinity.
    """
    chosen = chosen_recipe(recipe, bits)
    return fit(gather(model, windows, chosen, tier=tier, fisher=fisher), chosen)


def gather(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    recipe: str | Recipe = "default",
    *,
    tier: Tier = "basic",
    fisher: bool = False,
    progress: Progress = iter,
) -> ModelStatistics:
    """Calibration statistics from one pass of the model over the windows.

    `fit` fits any number of recipes and bit widths from them, provided that these use the same stage of keys as
    `recipe` and need no other statistics.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    windows : Int64[Tensor, "windows tokens"]
        Token ids of the calibration text, without padding.
    recipe : str or Recipe
        Name of a shipped recipe, a recipe file, or a recipe: the stage of its keys and the statistics it needs.
    tier : {'basic', 'full'}
        Set of statistics; `full` is enough for every recipe and takes more memory.
    fisher : bool
        Gather squared gradients too: one backward pass per window.
    progress : callable
        Wraps the windows, for a progress bar.

    Returns
    -------
    ModelStatistics
        Input of `fit`; `save` writes them to a file, `merge` adds those of another shard.

    Raises
    ------
    RecipeError
        If the recipe cannot be read, or does not go with the model's shape.
    CorpusError
        If a token id is beyond the model's vocabulary.
    UnsupportedModelError
        If a layer cannot be handled, with the reason.
    NonFiniteError
        If activations hold NaN or infinity.
    MemoryError
        If the statistics need more memory than is free.

    Examples
    --------
    >>> def widths(model, windows):
    ...     statistics = gather(model, windows, "kvquant")
    ...     return {bits: fit(statistics, "kvquant", bits=bits) for bits in (2, 3, 4)}
    """
    chosen = chosen_recipe(recipe)
    layers = attention_layers(model)
    check(chosen, site_shapes(layers, chosen.stage))
    taken: Tier = "full" if chosen.needs_full else tier
    statistics = new_statistics(model, layers, stage=chosen.stage, tier=taken, fisher=fisher or chosen.needs_fisher)
    add_windows(model, layers, statistics, windows, progress)
    return statistics


def new_statistics(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    *,
    stage: Stage = "pre_rope",
    tier: Tier = "basic",
    fisher: bool = False,
    **origin: Any,
) -> ModelStatistics:
    """Empty statistics for a model.

    Parameters
    ----------
    model : nn.Module
        With its configuration.
    layers : Sequence[AttentionLayer]
        Its attention layers.
    stage : {'pre_rope', 'post_rope'}
        Where keys and queries are taken.
    tier : {'basic', 'full'}
        Which statistics to take.
    fisher : bool
        Whether squared gradients are taken too, by one backward pass for each window.
    **origin
        `model_id`, `corpus`, `seed`, `start_token` and `tokenizer_digest`, as far as they are known.

    Raises
    ------
    MemoryError
        If the statistics need more memory than is free.
    """
    fingerprint = model_fingerprint(model, layers, origin.pop("tokenizer_digest", None))
    known = {"model_id": None, "corpus": "windows", "seed": None, **origin}
    statistics = ModelStatistics(
        site_shapes(layers, stage), tier, Origin(model=fingerprint, tool_version=tool_version(), **known), fisher=fisher
    )
    check_memory(statistics, next(model.parameters()).device)
    return statistics


def check_memory(statistics: ModelStatistics, device: torch.device) -> None:
    """Logs the memory of the statistics on the device of the model.

    Raises
    ------
    MemoryError
        If it exceeds the free memory.
    """
    # Checked before the run: statistics have a fixed size that depends on the model's shape and the tier alone.
    needed = statistics.estimated_bytes()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    _LOG.info("statistics (%s) take %s; %s are free", statistics.tier, gigabytes(needed), gigabytes(free))
    if needed > free:
        smaller = " Use --statistics basic." if statistics.tier == "full" else " Free memory or use another machine."
        raise MemoryError(
            f"calibrate: statistics of tier {statistics.tier} need {gigabytes(needed)}; {gigabytes(free)} are free."
            + smaller
        )


def gigabytes(n_bytes: int) -> str:
    """Size as text, in GiB or MiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"


def add_windows(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    statistics: ModelStatistics,
    windows: Int64[Tensor, "windows tokens"],
    progress: Progress = iter,
) -> None:
    """Runs the model over windows and updates the statistics, one forward pass per window.

    Raises
    ------
    CorpusError
        If a token id is beyond the vocabulary.
    NonFiniteError
        If activations hold NaN or infinity.
    """
    check_vocabulary(windows, text_config(model).vocab_size, statistics.origin.corpus)
    batches: Iterable[Any] = progress(list(single_windows(windows)))
    # After an error or an interrupt the sketch of the text must cover the windows that are in the statistics, no more.
    before = len(statistics.windows)
    try:
        with evaluating(model):
            collect(model, layers, statistics, batches)
    finally:
        finished = windows[: len(statistics.windows) - before]
        if len(finished) and finished.shape[1] >= NGRAM_TOKENS:
            statistics.ngrams = merge_sketches(statistics.ngrams, ngram_sketch(finished, ngram_tokens=NGRAM_TOKENS))
