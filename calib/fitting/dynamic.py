"""Quantizers without calibration, with dynamic scales only."""

from collections.abc import Sequence

from torch import nn

from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from calib.capture import site_shapes
from calib.recipe.errors import RecipeError
from calib.recipe.layer_choice import check
from calib.recipe.recipe import Recipe, chosen_recipe


def dynamic(
    model: nn.Module,
    recipe: str | Recipe = "kvquant",
    *,
    bits: int | None = None,
    layers: Sequence[AttentionLayer] | None = None,
) -> dict[Site, Quantizer]:
    """Quantizers of a recipe that needs no calibration, for `simulate`, `packed_cache` and `evaluate`.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    recipe : str or Recipe
        Name of a shipped recipe, a recipe file, or a recipe. Its sink tokens and cache entry are for a `CachePolicy`.
    bits : int or None
        Code width for keys and values; None leaves it to the recipe.
    layers : sequence of AttentionLayer or None
        Result of `attention_layers(model)`, if it is known already.

    Returns
    -------
    dict from Site to Quantizer
        One for the keys and one for the values of every layer.

    Raises
    ------
    RecipeError
        If the recipe cannot be read, does not suit the model's shape, or needs calibration.
    UnsupportedModelError
        If a layer cannot be handled, with the reason.

    Examples
    --------
    >>> def four_bits(model, ids):
    ...     from simquant import simulate
    ...     with simulate(model, dynamic(model, bits=4)):
    ...         return model(ids).logits
    """
    chosen = chosen_recipe(recipe, bits)
    layers = attention_layers(model) if layers is None else layers
    shapes = {shape.site: shape for shape in site_shapes(layers, chosen.stage)}
    quantizers = {}
    for site, estimator in check(chosen, list(shapes.values())).items():
        try:
            quantizers[site] = estimator.dynamic(shapes[site])
        except ValueError as error:
            raise RecipeError(f"recipe {chosen.name} without calibration: {site}: {error}") from error
    dynamic_sinks(chosen)
    return quantizers


def dynamic_sinks(recipe: Recipe) -> int:
    """Sink tokens of a recipe that is used without calibration.

    Raises
    ------
    RecipeError
        If calibration would choose their number.
    """
    if recipe.sink_tokens == "auto":
        raise RecipeError(
            f"recipe {recipe.name} without calibration: sink_tokens: auto is chosen from calibration statistics; "
            "calibrate first, or give a number (--first-few-fp16 N, sink_tokens: N)"
        )
    return recipe.sink_tokens
