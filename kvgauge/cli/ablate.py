"""Remove one ingredient of a recipe at a time, and compare the loss with that of the full recipe, window by window.

Ingredients are, for example, the outliers, the tokens kept in full precision, or the rotation.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from kvgauge.cli.options import common as options
from kvgauge.cli.options.common import parsed, parsed_settings
from kvgauge.cli.options.protocol import add_protocol_options
from kvgauge.configuration.eviction import EvictionConfig
from kvgauge.configuration.fields import flag
from kvgauge.configuration.gather import NSAMPLES
from kvgauge.configuration.model import ModelConfig, short_name
from kvgauge.terminal.console import Parser, UsageError, run, say, set_up_logging
from kvgauge.terminal.outputs import output_folder

LEGEND = """\
Rise of the loss in nats per token when the ingredient is removed, with its standard error over the same windows; above
zero the ingredient helps. Bits are counted per element, the mean of keys and values, tokens in full precision included:
where they differ, part of the rise is due to those bits."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """A recipe and a model; how it is run stands in `Settings`.

    Parameters
    ----------
    recipe : str
        A shipped one, or a file.
    model : ModelConfig
        That the recipe is fitted to.
    eviction : EvictionConfig
        Must be empty: eviction is no part of a recipe.
    ingredients : str or None
        Names, with commas between; None is all that the recipe has.
    json : bool
        Print one JSON object instead of the table.
    output : Path or None
        Folder for the results.
    verbose : bool
        Log what happens.
    """

    recipe: str
    model: ModelConfig = field(default_factory=ModelConfig)
    eviction: EvictionConfig = field(default_factory=EvictionConfig)
    ingredients: str | None = None
    json: bool = False
    output: Path | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.eviction.given:
            raise UsageError(
                f"{', '.join(map(flag, self.eviction.given))}: no effect in ablate, which never drops tokens; remove it"
            )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("kvgauge ablate", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `ablate`."""
    parser = Parser("kvgauge ablate", __doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="shipped recipe or .yaml file")
    options.add_model_options(parser)
    options.add_text_options(parser)
    add_protocol_options(parser)
    options.add_calibration_text(parser)
    parser.add_argument(
        "--statistics", choices=("basic", "full"), help="statistics to gather (default: what the recipe needs)"
    )
    for name, what in (
        ("nsamples", f"calibration windows (default: {NSAMPLES})"),
        ("limit", "windows to evaluate (default: all)"),
        ("batch-size", "windows per forward pass (default: 1)"),
    ):
        parser.add_argument(f"--{name}", type=options.positive, metavar="N", help=what)
    parser.add_argument(
        "--ingredients",
        metavar="A,B,...",
        help="ingredients to remove, one at a time (default: all that the recipe has)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for ablation.json and ablation.md (default: runs/ablate-MODEL-RECIPE)",
    )
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    config, settings = parsed(AblateConfig, args), parsed_settings(args)
    set_up_logging(config.verbose)
    from calib.recipe.recipe import load_recipe
    from kvgauge.comparing.ablation import Setup
    from kvgauge.comparing.ablation_run import ablate
    from kvgauge.terminal.outputs import replace_text
    from simquant.evaluation.figures import error_text

    recipe = load_recipe(config.recipe)
    ingredients = _ingredients(config.ingredients)
    model = config.model.name
    folder = output_folder(config.output or Path("runs") / f"ablate-{short_name(model)}-{recipe.name}")
    found = ablate(Setup(recipe, settings), model, ingredients)
    command = shlex.join(["kvgauge", "ablate", *argv])
    results = {"command": command, "recipe": recipe.model_dump(mode="json"), **found.to_json()}
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    title = f"{recipe.name} on {short_name(model)}: {found.full.bits['average']:.3f} bits, {found.full.protocol}"
    loss = f"The full recipe loses {found.full.loss_nats:.5f} ± {error_text(found.full.loss_nats_stderr, '.5f')} nats."
    markdown = "\n\n".join([title, f"```\n{command}\n```", found.table(), loss, LEGEND]) + "\n"
    replace_text(folder / "ablation.json", text)
    replace_text(folder / "ablation.md", markdown)
    print(text if config.json else markdown, end="")
    say(f"{folder}: ablation.json, ablation.md")
    return 0


def _ingredients(names: str | None) -> list[str]:
    from calib.recipe.errors import nearest
    from kvgauge.comparing.ablation import INGREDIENTS

    found = list(INGREDIENTS) if names is None else names.split(",")
    for name in found:
        if name not in INGREDIENTS:
            known = f"known: {', '.join(INGREDIENTS)}.{nearest(name, INGREDIENTS)}"
            raise UsageError(f"--ingredients: unknown ingredient {name!r}; {known}")
    return found


if __name__ == "__main__":
    sys.exit(main())
