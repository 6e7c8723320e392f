"""What each ingredient of a recipe is worth: one at a time is removed, and the loss compared on the same windows.

Run it as `kvgauge ablate RECIPE MODEL --dataset FILE`.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvgauge.cli.options import common as options
from kvgauge.cli.options.common import NSAMPLES
from kvgauge.cli.options.protocol import add_protocol_options
from kvgauge.terminal.console import Parser, UsageError, run, say, set_up_logging
from kvgauge.terminal.outputs import output_folder

if TYPE_CHECKING:
    from kvgauge.sweeping.settings import Settings

LEGEND = """\
Nats per target that are lost more when the ingredient is removed, with the standard error of the difference on the
same windows; above zero it helps. Bits are counted per element, the mean of keys and values, exact tokens included:
where they differ, the nats are the price or the gain of those bits too."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("kvgauge ablate", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `ablate`."""
    parser = Parser("kvgauge ablate", __doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="name or .yaml file")
    options.add_model_options(parser)
    options.add_text_options(parser)
    add_protocol_options(parser)
    parser.add_argument("--calibration-dataset", metavar="NAME|FILE", help="text to calibrate on (default: --dataset)")
    parser.add_argument("--statistics", choices=("basic", "full"), default="basic", help="what to gather")
    for name, default, what in (
        ("nsamples", NSAMPLES, f"calibration windows (default: {NSAMPLES})"),
        ("limit", None, "windows to evaluate at most (default: all)"),
        ("batch-size", 1, "windows per forward pass (default: 1)"),
    ):
        parser.add_argument(f"--{name}", type=options.positive, default=default, metavar="N", help=what)
    parser.add_argument("--ingredients", metavar="A,B,...", help="to remove (default: all that the recipe has)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/ablate-MODEL-RECIPE")
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    set_up_logging(args.verbose)
    options.choose_defaults(args)
    from calib.recipe.recipe import load_recipe
    from kvgauge.comparing.ablation import Setup
    from kvgauge.comparing.ablation_run import ablate
    from kvgauge.loading.models import short_name
    from kvgauge.terminal.outputs import replace_text
    from simquant.evaluation.figures import error_text

    recipe = load_recipe(args.recipe)
    ingredients = _ingredients(args.ingredients)
    setup = Setup(recipe, _settings(args))
    folder = output_folder(args.output or Path("runs") / f"ablate-{short_name(args.model)}-{recipe.name}")
    found = ablate(setup, args.model, ingredients)
    command = shlex.join(["python", "-m", "kvgauge.cli.ablate", *argv])
    results = {"command": command, "recipe": recipe.model_dump(mode="json"), **found.to_json()}
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    title = f"{recipe.name} on {short_name(args.model)}: {found.full.bits['average']:.3f} bits, {found.full.protocol}"
    loss = f"The full recipe loses {found.full.loss_nats:.5f} ± {error_text(found.full.loss_nats_stderr, '.5f')} nats."
    markdown = "\n\n".join([title, f"```\n{command}\n```", found.table(), loss, LEGEND]) + "\n"
    replace_text(folder / "ablation.json", text)
    replace_text(folder / "ablation.md", markdown)
    print(text if args.json else markdown, end="")
    say(f"{folder}: ablation.json, ablation.md")
    return 0


def _ingredients(names: str | None) -> list[str]:
    from calib.recipe.errors import nearest
    from kvgauge.comparing.ablation import INGREDIENTS

    found = list(INGREDIENTS) if names is None else names.split(",")
    for name in found:
        if name not in INGREDIENTS:
            known = f"known: {', '.join(INGREDIENTS)}.{nearest(name, INGREDIENTS)}"
            raise UsageError(f"--ingredients: unknown {name!r}; {known}")
    return found


def _settings(args: argparse.Namespace) -> "Settings":
    from pydantic import ValidationError

    from kvgauge.cli.options.eviction import eviction_of
    from kvgauge.sweeping.settings import Settings

    if eviction_of(args) is not None:
        raise UsageError("ablate measures what recipes keep; drop the options of eviction")
    try:
        return Settings(**{name: value for name, value in vars(args).items() if name in Settings.model_fields})
    except ValidationError as error:
        rows = [f"--{'.'.join(map(str, row['loc']))}: {row['msg']}" for row in error.errors()]
        raise UsageError("\n".join(row.removeprefix("--: Value error, ") for row in rows)) from error


if __name__ == "__main__":
    sys.exit(main())
