"""The command `kvgauge`: one name for all programs."""

import difflib
import importlib
import sys

from kvgauge.terminal.console import WRONG_USAGE, say

PROGRAMS = {
    "calibrate": "fit quantizers for a model's cache and write an artifact",
    "evaluate": "measure what an artifact, or a recipe without calibration, costs",
    "artifact": "inspect, validate, compare and convert artifacts",
    "compare": "put recipes side by side on the same windows",
    "sweep": "run recipes on models for tasks, restartable; or search for the best setting under a bit budget",
    "ablate": "tell what each ingredient of a recipe is worth",
    "report": "make the page of a report again from its JSON",
    "demo": "calibrate and evaluate the bundled model at 4, 3 and 2 bits",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the program that the first word names; returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else WRONG_USAGE
    if words[0] == "--version":
        from artifacts.manifest import tool_version

        print(f"kvgauge {tool_version()}")
        return 0
    if words[0] not in PROGRAMS:
        near = difflib.get_close_matches(words[0], PROGRAMS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PROGRAMS)}."
        say(f"kvgauge: no command {words[0]!r}; {hint} See kvgauge --help")
        return WRONG_USAGE
    return int(importlib.import_module(f"kvgauge.cli.{words[0]}").main(words[1:]))


def _help() -> str:
    rows = (f"  {name:<10} {what}" for name, what in PROGRAMS.items())
    return "\n".join(
        ["usage: kvgauge COMMAND ...", "", *rows, "", "kvgauge COMMAND --help tells the options of a command."]
    )


if __name__ == "__main__":
    sys.exit(main())
