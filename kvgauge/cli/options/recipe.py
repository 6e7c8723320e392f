"""Options of the command line that edit a recipe."""

import argparse

from kvgauge.cli.options.common import BITS


def add_recipe_options(parser: argparse.ArgumentParser, default_recipe: str) -> None:
    """Adds the recipe, and one option for each edit to it."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"shipped recipe or .yaml file (default: {default_recipe})"
    )
    group.add_argument(
        "--abits", "--bits", type=int, choices=BITS, metavar="N", help="bits for keys and values; 16 is exact"
    )
    group.add_argument(
        "--target-bits",
        type=float,
        metavar="B",
        help="mean bits of all keys and values, shared out among the sites (recipes that allot levels)",
    )
    group.add_argument("--key-bits", "--kbits", type=int, choices=BITS, metavar="N", help="bits for keys")
    group.add_argument("--value-bits", "--vbits", type=int, choices=BITS, metavar="N", help="bits for values")
    group.add_argument(
        "--nuq",
        action=argparse.BooleanOptionalAction,
        help="non-uniform codebooks by k-means, or uniform grids",
    )
    group.add_argument("--include-sparse", action=argparse.BooleanOptionalAction, help="keep outliers beside the codes")
    group.add_argument("--sparsity-threshold", type=float, metavar="SHARE", help="share kept dense (default: 0.99)")
    group.add_argument("--perchannel", nargs="*", metavar="PROJ", help="k_proj and/or v_proj: one range per channel")
    group.add_argument("--pertoken", nargs="*", metavar="PROJ", help="k_proj and/or v_proj: each token's own range")
    group.add_argument("--symmetric", action="store_true", default=None, help="uniform grids centred on zero")
    group.add_argument("--clamp", action="store_true", default=None, help="whole zero points within the code range")
    group.add_argument("--first-few-fp16", type=int, metavar="N", help="first tokens kept exact, 0 to 8")
    group.add_argument("--stage", choices=("pre_rope", "post_rope"), help="where keys are taken")
