"""Runs the commands behind claims, and compares."""

import contextlib
import importlib
import io
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvgauge.terminal.console import UsageError, say
from scripts.claims.file import Claim
from scripts.claims.output import Output, UnreadableError
from scripts.claims.tables import agree, allowance, figures

_PROGRAM = re.compile(r"(?:python -m scripts\.)?([a-z_]+)")


@dataclass(frozen=True)
class Finding:
    """A cell of a claim and what was found: the text, or why there is none; `agrees` if within the tolerance."""

    where: str
    expected: str
    found: str
    agrees: bool
    allowed: str

    def describe(self) -> str:
        """One line."""
        return f"{self.where}: expected {self.expected}; got {self.found}; allowed are {self.allowed}"


@dataclass
class Runner:
    """Runs each sequence of commands once, in this process and in an empty folder.

    Parameters
    ----------
    data : Path or None
        Folder whose files and folders lie in that folder, as links.
    """

    data: Path | None = None
    _outputs: dict[tuple[str, ...], Output | str] = field(default_factory=dict)

    def check(self, claim: Claim) -> list[Finding]:
        """What the claim's commands give for each of its cells."""
        findings = []
        for cell in claim.cells():
            output = self._output(cell.commands, claim.files)
            try:
                found = cell.read(output) if isinstance(output, Output) else output
            except UnreadableError as error:
                found = f"nothing: {error}"
            allowed = ", ".join(f"±{allowance(own, claim.tolerance):.2g}" for own in figures(cell.expected))
            agrees = isinstance(output, Output) and agree(cell.expected, found, claim.tolerance)
            findings.append(Finding(cell.where, cell.expected, found, agrees, allowed))
        return findings

    def _output(self, commands: tuple[str, ...], files: Mapping[str, str]) -> Output | str:
        """What the last command printed, or which one failed."""
        key = (*commands, *sorted(files.values()))
        if key not in self._outputs:
            try:
                self._outputs[key] = Output(self._run(commands, files))
            except UsageError as error:
                self._outputs[key] = str(error)
        return self._outputs[key]

    def _run(self, commands: tuple[str, ...], files: Mapping[str, str]) -> str:
        with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
            for path in sorted(self.data.iterdir()) if self.data is not None else ():
                Path(path.name).symlink_to(path)
            for file, text in files.items():
                Path(file).unlink(missing_ok=True)  # a link to the data must not be written through
                Path(file).write_text(text, encoding="utf-8")
            return [run_command(command) for command in commands][-1]


def run_command(command: str) -> str:
    """What one of our programs prints, called as typed: `evaluate ...`, or `kvgauge demo ...`.

    Raises
    ------
    UsageError
        If it fails; it has said why on standard error.
    """
    program = _PROGRAM.match(command)
    assert program is not None, command
    say(f"$ {command}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            status = importlib.import_module(f"scripts.{program[1]}").main(shlex.split(command[program.end() :]))
        except SystemExit as stop:  # argparse
            status = stop.code
    if status:
        raise UsageError(f"nothing: `{command}` ended with status {status}")
    return printed.getvalue()
