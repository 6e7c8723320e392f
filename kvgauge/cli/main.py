"""The command `kvgauge`: one name for all programs."""

import difflib
import importlib
import sys

from kvgauge.terminal.console import WRONG_USAGE, say

PROGRAMS = {
    "calibrate": "fit quantizers for a model's keys and values, and write them to an artifact",
    "evaluate": "measure the loss of a quantized cache, on text or in tasks",
    "artifact": "inspect, validate, compare and convert artifacts",
    "compare": "compare recipes on the same windows: bits, losses, Pareto plot",
    "sweep": "run recipes on models for tasks; or search for the best setting within a bit budget",
    "ablate": "measure the worth of each ingredient of a recipe",
    "report": "write the page of a report again from its report.json",
    "models": "list small models that are known by name, or download one",
    "demo": "calibrate and evaluate the bundled model at 4, 3 and 2 bits",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the program that the first word names; returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else WRONG_USAGE
    if words[0] == "--version":
        from artifacts.manifest import tool_version

        print(f"kvgauge {tool_version()}")
        return 0
    if words[0] not in PROGRAMS:
        near = difflib.get_close_matches(words[0], PROGRAMS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PROGRAMS)}."
        say(f"kvgauge: unknown command {words[0]!r}; {hint}\nSee kvgauge --help")
        return WRONG_USAGE
    return int(importlib.import_module(f"kvgauge.cli.{words[0]}").main(words[1:]))


def _help() -> str:
    rows = (f"  {name:<10} {what}" for name, what in PROGRAMS.items())
    return "\n".join(
        [
            "usage: kvgauge COMMAND ...",
            "",
            "Calibrate, store and evaluate quantizers for the key-value cache of language models.",
            "",
            *rows,
            "",
            "Options of a command: kvgauge COMMAND --help",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
