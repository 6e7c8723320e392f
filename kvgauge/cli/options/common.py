"""Options of the command line that several programs share, and the kinds of their values."""

import argparse
from typing import TYPE_CHECKING, get_args

from kvgauge.configuration.fields import Configuration, filled
from kvgauge.configuration.model import Dtype
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from kvgauge.sweeping.settings import Settings

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)

FRACTION_HELP = "fraction of values quantized; the rest are kept as 16-bit outliers (default: 0.99)"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the model, its device and its dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, .gguf file or hub id (owner/name, owner/name:file.gguf) of a causal language model, or a name "
        "that kvgauge models lists (default: demo, the bundled model)",
    )
    group.add_argument(
        "--device", help="cpu, cuda, cuda:1, ..., or auto for accelerate's device map (default: cuda, else cpu)"
    )
    group.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        help="dtype of the model's weights; statistics are always float32 or wider (default: auto, as stored)",
    )
    group.add_argument(
        "--maxseqlen",
        type=positive,
        metavar="N",
        help="extend the context to N tokens by linear RoPE scaling, as KVQuant does (default: the model's own)",
    )
    group.add_argument("--no-flash-attn", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--verbose", action="store_true", help="log each step")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_calibration_text(parser: argparse.ArgumentParser) -> None:
    """Adds the text for calibration, where --dataset names the one for evaluation."""
    parser.add_argument(
        "--calibration-dataset",
        metavar="NAME|FILE",
        help="text for calibration (default: --dataset, its training part where it has one)",
    )


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Adds the text and its windows."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--dataset",
        "--datasets",
        metavar="NAME|FILE",
        help="demo, wikitext2, c4, ptb, kjv (the King James Bible, from the package index), self (text that the model "
        "writes itself), or a file: plain text, .jsonl, .csv, .tsv (each also as .gz), .parquet, or token ids, .npy "
        "and .bin; .jsonl and .parquet may hold conversations (default: demo for the demo model, else wikitext2)",
    )
    group.add_argument(
        "--field",
        metavar="NAME",
        help="field or column with the text in .jsonl, .csv and .parquet files (default: text)",
    )
    group.add_argument(
        "--seqlen",
        type=positive,
        metavar="N",
        help="tokens per window (default: 2048, or the model's context where that is shorter)",
    )
    group.add_argument(
        "--bos",
        action="store_true",
        help="put the tokenizer's start token (BOS) first in every window, counted in --seqlen; use it in calibrate "
        "and evaluate alike, for models whose prompts start with BOS (default: plain text, as in the published tables)",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="random seed of calibration windows and task items (default: 0)"
    )


def parsed(kind: type[Configuration], args: argparse.Namespace) -> Configuration:
    """The configuration that was typed; the only reader of parsed options beside `parsed_settings`.

    Raises
    ------
    UsageError
        If options do not go together.
    """
    return filled(kind, vars(args))


def parsed_settings(args: argparse.Namespace) -> "Settings":
    """The settings of cells that were typed, as the file of a sweep names them.

    Raises
    ------
    UsageError
        If options do not go together.
    """
    from pydantic import ValidationError

    from kvgauge.sweeping.settings import Settings

    given = {name: value for name, value in vars(args).items() if value is not None}
    try:
        return Settings(**{name: value for name, value in given.items() if name in Settings.model_fields})
    except ValidationError as error:
        rows = [f"--{'.'.join(map(str, row['loc']))}: {row['msg']}" for row in error.errors()]
        raise UsageError("\n".join(row.removeprefix("--: Value error, ") for row in rows)) from error


def whole(text: str) -> int:
    """An integer from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer from 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)


def number_or_auto(text: str) -> int | str:
    """An integer, or `auto`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or auto, got {text!r}") from None


def shard(text: str) -> tuple[int, int]:
    """`2/4` for the second of four shards."""
    number, _, total = text.partition("/")
    if not (number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 2/4; got {text!r}")
    return int(number), int(total)
