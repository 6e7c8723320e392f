"""Checks claims of the documentation on SmolLM2, and prints each with its bound.

`--quick` takes the bundled text in windows of 128 tokens, a minute on two idle cores; without it the check takes ten
minutes. The exit status is 1 if a claim does not hold. From the checkout: `make real`, or `python -m scripts.real`.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from calib.text.windows import Windows, sample_windows, split_windows
from kvgauge.configuration.model import DEMO, ModelConfig
from kvgauge.loading.models import LoadedModel, load_model
from kvgauge.terminal.console import Parser, run
from scripts.real.claim import table
from scripts.real.claims import all_claims, all_recipes, quick_claims, quick_recipes
from scripts.real.measurement import measure
from scripts.real.parts import write_parts


@dataclass(frozen=True)
class Size:
    """Windows for calibration, as many for scoring, and their tokens; the text where no file is given."""

    windows: int
    tokens: int
    text: str


QUICK, WHOLE = Size(32, 128, DEMO), Size(8, 2048, "kjv")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("real", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser("python -m scripts.real", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer claims, on short windows")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="WikiText, of which a part is for calibration and another one for scoring (default: the King James "
        "Bible, from the package index; with --quick the bundled pages)",
    )
    parser.add_argument("--model", default="smollm2", help="(default: smollm2)")
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    size = QUICK if args.quick else WHOLE
    found = load_model(ModelConfig(model=args.model, dtype="float32"))
    calibration, scored = windows(found, args.text, size)
    recipes, made = (quick_recipes(), quick_claims) if args.quick else (all_recipes(), all_claims)
    found_claims = made(measure(found.model, calibration, scored, recipes))
    print(table(found_claims))
    return int(not all(claim.holds for claim in found_claims))


def windows(found: LoadedModel, text: Path | None, size: Size) -> tuple[Windows, Windows]:
    """For calibration and for scoring, of different parts of the text."""
    with TemporaryDirectory() as folder:
        first, last = (size.text, size.text) if text is None else map(str, write_parts(text, Path(folder))[::2])
        calibration, held_out = found.corpus(first, "calibration", "text"), found.corpus(last, "evaluation", "text")
    return (
        sample_windows(calibration, n_windows=size.windows, seqlen=size.tokens, seed=0),
        split_windows(held_out, seqlen=size.tokens, limit=size.windows),
    )


if __name__ == "__main__":
    sys.exit(main())
