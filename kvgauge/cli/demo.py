"""Calibrate and evaluate the bundled model at 4, 3 and 2 bits; prints the commands and a table."""

import argparse
import contextlib
import io
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvgauge.cli import calibrate, evaluate
from kvgauge.cli.options.common import parsed, positive
from kvgauge.terminal.console import Parser, UsageError, run, say

BITS = (4, 3, 2)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """A folder to write to, and windows to evaluate."""

    output: Path = Path("runs/demo")
    limit: int = 32


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("kvgauge demo", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser("kvgauge demo", __doc__)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the artifacts (default: runs/demo)")
    parser.add_argument("--limit", type=positive, metavar="N", help="windows to evaluate (default: 32)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _main(argv: list[str]) -> int:
    config = parsed(DemoConfig, parser().parse_args(argv))
    started = time.monotonic()
    statistics = config.output / "statistics.safetensors"
    files = {bits: config.output / f"nuq{bits}.safetensors" for bits in BITS}
    results: list[dict[str, Any]] = []
    for bits, file in files.items():
        # Statistics are gathered once, by the first command, and serve all bits.
        source = ["--from-statistics", statistics] if results else ["--nsamples", 16, "--save-statistics", statistics]
        _call(calibrate, *source, "--nuq", "--abits", bits, "--quantizer-path", file, "--force")
        report = _call(evaluate, "--quantizer-path", file, "--limit", config.limit, "--json")
        results.append(json.loads(report))
    print(table(BITS, results))
    _write(config.output / "results.json", ["kvgauge", "demo", *argv], results)
    print(f"\nin {time.monotonic() - started:.0f} s. What was fitted lies in {config.output}; look into it with")
    print(f"  artifact inspect {shlex.quote(str(files[BITS[0]]))}")
    return 0


def _write(path: Path, command: list[str], results: list[dict[str, Any]]) -> None:
    from kvgauge.running.machine import hardware, versions
    from kvgauge.terminal.outputs import replace_text

    rows = [{"name": f"{bits} bits", **result} for bits, result in zip(BITS, results, strict=True)]
    found = {"command": shlex.join(command), "hardware": hardware(), "versions": versions(), "rows": rows}
    replace_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def table(bits: tuple[int, ...], results: list[dict[str, Any]]) -> str:
    """Loss over bits; bits are counted, scales of the tokens included."""
    from simquant.evaluation.figures import error_text

    rows = [f"{'codes':>9} {'bits, keys / values':>20} {'perplexity':>11} {'loss in nats per token':>23} {'KL':>8}"]
    rows.append(f"{'exact':>9} {'16.00 / 16.00':>20} {results[0]['fp']['perplexity']:>11.3f} {'0':>23} {'0':>8}")
    for width, result in zip(bits, results, strict=True):
        counted = f"{result['bits']['key']:.2f} / {result['bits']['value']:.2f}"
        loss = f"{result['loss_nats']:.4f} ± {error_text(result['loss_nats_stderr'], '.4f')}"
        perplexity = result["quantized"]["perplexity"]
        rows.append(f"{width:>4} bits {counted:>20} {perplexity:>11.3f} {loss:>23} {result['kl_mean']:>8.4f}")
    return "\n".join(rows)


def _call(program: Any, *words: object) -> str:
    """Runs a program as typed, shows the command, and returns what it printed.

    Raises
    ------
    UsageError
        If it failed; it has said why.
    """
    argv = [str(word) for word in words]
    name = program.__name__.rpartition(".")[2]
    say(f"$ {shlex.join([name, *argv])}")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = program.main(argv)
    if status:
        raise UsageError(f"{name} failed with exit status {status}; its message is above")
    return output.getvalue()


if __name__ == "__main__":
    sys.exit(main())
