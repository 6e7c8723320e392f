"""Options of the command line that edit a recipe."""

import argparse
from typing import TYPE_CHECKING, Any

from kvgauge.cli.options.common import BITS, FRACTION_HELP, number_or_auto
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from calib.recipe.recipe import Recipe


def add_recipe_options(parser: argparse.ArgumentParser, default_recipe: str) -> None:
    """Adds the recipe, and one option for each edit to it."""
    group = parser.add_argument_group("recipe (each option below --recipe changes one setting of it)")
    group.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"shipped recipe or .yaml file (default: {default_recipe})"
    )
    group.add_argument(
        *("--abits", "--bits"),
        type=int,
        choices=BITS,
        metavar="N",
        help="bits per element of keys and values, 1 to 8; 16 turns quantization off",
    )
    group.add_argument("--key-bits", "--kbits", type=int, choices=BITS, metavar="N", help="bits of keys only")
    group.add_argument("--value-bits", "--vbits", type=int, choices=BITS, metavar="N", help="bits of values only")
    group.add_argument(
        "--target-bits",
        type=float,
        metavar="B",
        help="bit budget: mean bits over all layers' keys and values; a recipe with bit allocation spends it where the "
        "loss is largest",
    )
    _add_method_options(group)


def _add_method_options(group: Any) -> None:
    group.add_argument(
        "--nuq",
        action=argparse.BooleanOptionalAction,
        help="non-uniform codebooks fitted by k-means; --no-nuq: uniform grids",
    )
    group.add_argument(
        "--include-sparse",
        action=argparse.BooleanOptionalAction,
        help="keep outliers in 16 bits beside the codes (dense-and-sparse)",
    )
    group.add_argument("--sparsity-threshold", type=float, metavar="FRACTION", help=FRACTION_HELP)
    group.add_argument("--perchannel", nargs="*", metavar="PROJ", help="k_proj and/or v_proj: one scale per channel")
    group.add_argument("--pertoken", nargs="*", metavar="PROJ", help="k_proj and/or v_proj: one scale per token")
    group.add_argument("--symmetric", action="store_true", default=None, help="uniform grids centred on zero")
    group.add_argument(
        "--clamp",
        action="store_true",
        default=None,
        help="round the zero point to an integer inside the code range",
    )
    group.add_argument(
        "--first-few-fp16",
        type=number_or_auto,
        metavar="N|auto",
        help="keep the first N tokens (attention sinks) in 16 bits, 0 to 8; auto: as many as calibration finds to pay",
    )
    group.add_argument(
        "--stage", choices=("pre_rope", "post_rope"), help="quantize keys before or after the rotary embedding"
    )


def named_recipes(names: str | None) -> "list[Recipe]":
    """Recipes by name or file, with commas between; None is all that are shipped.

    Raises
    ------
    UsageError
        If two have one name.
    """
    from calib.recipe.recipe import load_recipe, shipped_recipes

    recipes = [load_recipe(name) for name in (shipped_recipes() if names is None else names.split(","))]
    found = [recipe.name for recipe in recipes]
    twice = [name for name in found if found.count(name) > 1]
    if twice:
        raise UsageError(f"--recipes: {twice[0]} is there twice; drop one, or change the entry `name:` in its file")
    return recipes
