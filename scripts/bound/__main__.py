"""How far recipes are from what the statistics of keys and values allow: distortions beside rate-distortion limits.

A limit is the least distortion of Gaussian vectors with the covariance of a site (Shannon; reverse water-filling), if
a code may be as long and as slow as it likes. Errors are weighted as in fits: those of keys by the queries that read
them, those of values alike. `head`: channels of one head are coded together, and all heads share the bits; `layer`: all
heads together; `predicted`: all heads, given the exact keys and values of the layer before, and for values the key
beside them.

A Gaussian source is the hardest one of its covariance. The channel that is best for it, y = A x + noise, gives any
other source of this covariance the same squared error, and never carries more: I(x; y) = h(y) - h(noise), and of all y
with one covariance the Gaussian has the largest entropy. So the true limit of keys and values lies at or below the one
of the table, and a recipe that knows more of them than their covariance (outliers, clusters, likeness of neighbouring
tokens) could pass below it. (Cover and Thomas, theorems 8.6.5 and 10.3.3.)

Recipes are fitted to one text and measured, as are the limits, on windows of another: on rows that statistics sample
from it, position 8 and later, where every site keeps the same tokens and predicted sites read their sources as they are
decoded. On the rows that it is fitted to, `predictive` seems 1.5 to 2.5 dB better. The limit `predicted` is of
the measured text itself: p inputs and n tokens bring it down by a share p / n. Bits are counted from codes; what is
stored once is left out.

Scalar codes of fixed length lose up to 4.35 dB at many bits (Panter and Dite 1951), with an ideal entropy coder 1.53 dB
(Gish and Pierce 1968). From the checkout: `python -m scripts.bound`, two minutes on the bundled model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from calib.calibration import gather
from calib.fitting.chain import Chain
from calib.fitting.fit import fit
from calib.recipe.recipe import Recipe
from calib.statistics.site_statistics import FIRST_POSITIONS
from kvgauge.cli.options import common as options
from kvgauge.cli.options.common import parsed, parsed_settings
from kvgauge.cli.options.recipe import named_recipes
from kvgauge.configuration.gather import NSAMPLES
from kvgauge.configuration.model import ModelConfig
from kvgauge.running.evaluate_text import warn_of_overlap
from kvgauge.sweeping.gathering import Gathering, held_out
from kvgauge.terminal.console import Parser, UsageError, bar, run, set_up_logging
from kvgauge.terminal.outputs import replace_text
from scripts.bound.coded import coded
from scripts.bound.limits import LIMITS, site_limits
from scripts.bound.row import Row, limit_row, table

RECIPES = "default,kvquant-4-1pct,eigen,predictive"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("bound", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser("python -m scripts.bound", __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_model_options(parser)
    options.add_text_options(parser)
    options.add_calibration_text(parser)
    parser.add_argument(
        "--recipes", default=RECIPES, metavar="A,B,...", help=f"recipes, by name or .yaml file (default: {RECIPES})"
    )
    parser.add_argument(
        "--bits", type=rates, default=rates("2,3,4"), metavar="B,B,...", help="rates of the limits (default: 2,3,4)"
    )
    for name, what in (("nsamples", "calibration windows"), ("limit", "windows to measure on")):
        what += f" (default: {NSAMPLES})"
        parser.add_argument(f"--{name}", type=options.positive, default=NSAMPLES, metavar="N", help=what)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    return parser


def rates(text: str) -> tuple[float, ...]:
    """Bits of a channel, with commas between."""
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 <= bits <= 16 for bits in found):
        raise argparse.ArgumentTypeError(f"expected bits from 0 to 16 with commas between, such as 2,3,4; got {text!r}")
    return found


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    set_up_logging(args.verbose)
    model, settings, recipes = parsed(ModelConfig, args).name, parsed_settings(args), named_recipes(args.recipes)
    late = [recipe.name for recipe in recipes if recipe.stage != "pre_rope"]
    if late:
        raise UsageError(f"--recipes: {late[0]} codes keys after RoPE, the limits are of keys before it; leave it out")
    rows = measure(Gathering.serving(model, settings, "pre_rope", recipes), recipes, args.bits)
    print(table(rows))
    if args.json is not None:
        replace_text(args.json, json.dumps({"rows": [asdict(row) for row in rows]}, indent=1, allow_nan=False) + "\n")
    return 0


def measure(source: Gathering, recipes: Sequence[Recipe], bits: Sequence[float]) -> list[Row]:
    """Rows of the limits at each rate, then those of recipes that are fitted to what is gathered."""
    _, windows = held_out(source.model, source.settings)
    statistics = source.gather(partial(bar, what="calibrating"))
    artifacts = [fit(statistics, recipe, progress=partial(bar, what=f"fitting {recipe.name}")) for recipe in recipes]
    warn_of_overlap(artifacts[0], windows)
    model = source.load_model().model
    chain = Chain(gather(model, windows, tier="full", progress=partial(bar, what="measuring")), FIRST_POSITIONS)
    limits = {site: site_limits(chain, site) for site in bar(artifacts[0], "limits")}
    rows = [limit_row(limit, rate, limits) for rate in bits for limit in LIMITS]
    for recipe, artifact in zip(recipes, bar(artifacts, "coding"), strict=True):
        rows.append(Row.of(recipe.name, coded(chain, artifact, limits), limits))
    return rows


if __name__ == "__main__":
    sys.exit(main())
