"""Calibration in one call: run the model once, fit, and hand back an artifact."""

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
from calib.fitting.fit import fit
from calib.recipe.layer_choice import check
from calib.recipe.recipe import Recipe, load_recipe
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.origin import Origin
from calib.statistics.site_statistics import Tier
from calib.text.windows import NGRAM_TOKENS, check_vocabulary, merge_sketches, ngram_sketch

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
    """Fits quantizers for the key-value cache of a model.

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
        Take squared gradients too: one backward pass for each window. Recipes that read them turn it on.

    Returns
    -------
    Artifact
        To be saved by `artifacts.save` and run by `simquant.simulate`.

    Raises
    ------
    RecipeError
        If the recipe cannot be read, or does not go with the model's shape.
    UnsupportedModelError
        If a layer cannot be handled, with the reason.
    NonFiniteError
        If activations hold NaN or infinity.
    """
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if bits is not None:
        chosen = chosen.edited({"key": with_bits(bits), "value": with_bits(bits)})
    layers = attention_layers(model)
    check(chosen, site_shapes(layers, chosen.stage))
    taken: Tier = "full" if chosen.needs_full else tier
    statistics = new_statistics(model, layers, stage=chosen.stage, tier=taken, fisher=fisher or chosen.needs_fisher)
    add_windows(model, layers, statistics, windows)
    return fit(statistics, chosen)


def with_bits(bits: int) -> dict[str, Any]:
    """The change to a recipe entry that sets its code width; 16 keeps the site exact."""
    return {"method": "identity"} if bits == 16 else {"bits": bits}


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
    """Logs what the statistics will take where the model's activations are.

    Raises
    ------
    MemoryError
        If that is more than is free.
    """
    needed = statistics.estimated_bytes()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    _LOG.info("statistics (%s) take %s; %s are free", statistics.tier, gigabytes(needed), gigabytes(free))
    if needed > free:
        smaller = " Use --statistics basic." if statistics.tier == "full" else " Free memory or use another machine."
        raise MemoryError(
            f"calibrate: statistics of tier {statistics.tier} take {gigabytes(needed)}, {gigabytes(free)} are free."
            + smaller
        )


def gigabytes(n_bytes: int) -> str:
    """A size for people."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"


def add_windows(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    statistics: ModelStatistics,
    windows: Int64[Tensor, "windows tokens"],
    progress: Any = iter,
) -> None:
    """Runs the model over windows and feeds the statistics, one forward pass each.

    Raises
    ------
    CorpusError
        If a token id is beyond the vocabulary.
    NonFiniteError
        If activations hold NaN or infinity.
    """
    check_vocabulary(windows, text_config(model).vocab_size, statistics.origin.corpus)
    batches: Iterable[Any] = progress(list(single_windows(windows)))
    before = len(statistics.windows)
    try:
        with evaluating(model):
            collect(model, layers, statistics, batches)
    finally:
        finished = windows[: len(statistics.windows) - before]
        if len(finished) and finished.shape[1] >= NGRAM_TOKENS:
            statistics.ngrams = merge_sketches(statistics.ngrams, ngram_sketch(finished, ngram_tokens=NGRAM_TOKENS))
