"""Compare recipes on one model and the same windows: bits, losses, errors of single layers, and a Pareto plot.

Statistics, fitted quantizers and scores are kept in the output folder; run the same command again, with the same or
another --recipes, --dataset, --limit or --protocol, and it goes on from there.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgauge.cli.options import common as options
from kvgauge.cli.options.common import parsed, parsed_settings
from kvgauge.cli.options.recipe import named_recipes
from kvgauge.configuration.gather import NSAMPLES
from kvgauge.configuration.model import ModelConfig, short_name
from kvgauge.running.evaluate_text import tell, warn_of_overlap
from kvgauge.terminal.console import Parser, run, say, set_up_logging
from kvgauge.terminal.outputs import output_folder

if TYPE_CHECKING:
    from calib.recipe.recipe import Recipe
    from kvgauge.comparing.compared_recipe import ComparedRecipe
    from kvgauge.sweeping.settings import Settings


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A model and recipes to compare; how they are run stands in `Settings`.

    Parameters
    ----------
    model : ModelConfig
        That all recipes are fitted to.
    recipes : str or None
        Names or files, with commas between; None is all that are shipped.
    error_windows : int
        Windows for the errors of single layers.
    output : Path or None
        Folder for the results.
    verbose : bool
        Log what happens.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    recipes: str | None = None
    error_windows: int = 4
    output: Path | None = None
    verbose: bool = False


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("kvgauge compare", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `kvgauge compare`."""
    parser = Parser("kvgauge compare", __doc__)
    options.add_model_options(parser)
    options.add_text_options(parser)
    options.add_calibration_text(parser)
    parser.add_argument(
        "--recipes", metavar="A,B,...", help="recipes, by name or .yaml file (default: all shipped ones)"
    )
    parser.add_argument(
        "--statistics",
        choices=("basic", "full"),
        default="full",
        help="statistics to gather; full serves every recipe and takes more memory (default: full)",
    )
    parser.add_argument(
        "--protocol",
        choices=("full", "decode", "cache"),
        help="how the text goes through the quantized caches, see evaluate --help; decode and cache keep the recent "
        "tokens exact that a recipe asks for (default: full)",
    )
    for name, what in (
        ("nsamples", f"calibration windows (default: {NSAMPLES})"),
        ("limit", "windows to evaluate (default: all)"),
        ("batch-size", "windows per forward pass (default: 1)"),
        ("error-windows", "windows for the attention errors of single layers (default: 4)"),
    ):
        parser.add_argument(f"--{name}", type=options.positive, metavar="N", help=what)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for results.json, table.md and pareto.png (default: runs/compare-MODEL)",
    )
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    config, settings = parsed(CompareConfig, args), parsed_settings(args)
    set_up_logging(config.verbose)
    recipes = named_recipes(config.recipes)
    folder = output_folder(config.output or Path("runs") / f"compare-{short_name(config.model.name)}")
    from kvgauge.comparing.report import write_report

    try:
        about, rows = _compare(config, settings, recipes, folder)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"What is finished is in {folder / 'kept'}; the same command goes on from there."
        ) from error
    write_report(folder, {"command": shlex.join(["kvgauge", "compare", *argv]), **about}, rows)
    print((folder / "table.md").read_text(encoding="utf-8"), end="")
    say(f"{folder}: results.json, table.md, pareto.png")
    return 0


def _compare(
    config: CompareConfig, settings: "Settings", recipes: "list[Recipe]", folder: Path
) -> "tuple[dict[str, Any], list[ComparedRecipe]]":
    """Runs the comparison; returns its texts and settings as JSON values, and the recipes in order."""
    from kvgauge.comparing.compared_recipe import in_order
    from kvgauge.comparing.comparison import Comparison
    from kvgauge.comparing.kept_comparison import KeptComparison
    from kvgauge.sweeping.gathering import held_out, loaded

    model = config.model.name
    text, windows = held_out(model, settings)
    found = loaded(settings.evaluation(model).model)
    kept = KeptComparison.under(folder, model, settings)
    comparison = Comparison(found.model, found.layers(), recipes, kept)
    comparison.calibrate(model, settings)
    comparison.measure_layers(windows[: config.error_windows])
    pass_seconds = comparison.pass_seconds(windows[: config.error_windows])
    rows = in_order(comparison.evaluate(windows, settings.batch_size, settings.protocol))
    warn_of_overlap(rows[0].artifact, windows)
    tell(rows[0].result)
    corpus = rows[0].artifact.manifest.corpus
    about = {
        "model": model,
        "perplexity": rows[0].result.fp_perplexity,
        "window_tokens": windows.shape[1],
        "start_token": found.start_token(settings.bos),
        "calibration": {
            "text": corpus.name,
            "n_windows": corpus.n_windows,
            "seed": settings.seed,
            "tier": settings.statistics,
        },
        "evaluation": {
            "text": text.name,
            "n_windows": len(windows),
            "batch_size": settings.batch_size,
            "protocol": settings.protocol,
        },
        "seconds": {
            "gather": comparison.gather_seconds(),
            "bare": {"calibration": pass_seconds * corpus.n_windows, "evaluation": pass_seconds * len(windows)},
        },
        "error_windows": min(config.error_windows, len(windows)),
        "skipped": comparison.skipped,
    }
    return about, rows


if __name__ == "__main__":
    sys.exit(main())
