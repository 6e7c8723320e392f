"""Commands behind results, run again, and figures that moved."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvgauge.terminal.console import UsageError, say
from scripts.results.kinds import KINDS, Column, figure, kept
from scripts.results.schema import Figures, Results, numbers

CHECKOUT = Path(__file__).parents[2]
SHARED = "all rows"


def measured(results: Results, data: Path | None) -> dict[str, Figures]:
    """Figures by row that the commands give now; those that all rows share under `SHARED`.

    Parameters
    ----------
    results : Results
        A file with its commands.
    data : Path or None
        Folder whose files and folders lie beside the commands, as links.

    Raises
    ------
    UsageError
        If a command fails, or leaves no JSON.
    """
    kind = KINDS[results.kind]
    found: dict[str, Figures] = {}
    done: set[tuple[str, ...]] = set()
    for row in results.rows:
        commands = tuple(command.replace("{row}", row.name) for command in results.commands_of(row))
        if commands not in done:
            done.add(commands)
            written = _written(commands, results, data)
            found |= kind.read(written, row.name)
            found.setdefault(SHARED, kept(kind.shared, written))
    return found


def read(results: Results, written: Path) -> tuple[dict[str, Figures], dict[str, Any]]:
    """Figures by row that a command gave which was run by hand, in several goes, and its whole JSON.

    Parameters
    ----------
    results : Results
        A file whose rows all come from one such command.
    written : Path
        The JSON that it left.

    Raises
    ------
    UsageError
        If it is none, or that of another command.
    """
    kind = KINDS[results.kind]
    try:
        found = json.loads(written.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{written}: expected the JSON of `{results.commands[-1]}`; cannot read it: {error}"
        ) from error
    typed = re.sub(r" --output \S+", "", str(found.get("command")))
    if typed != results.commands[-1]:
        raise UsageError(f"{written}: expected the JSON of `{results.commands[-1]}`; got that of `{typed}`")
    return {**kind.read(found, ""), SHARED: kept(kind.shared, found)}, found


def moved(results: Results, found: dict[str, Figures]) -> Iterator[str]:
    """A line for each stored figure that is missing now, or is off by more than rounding and the tolerance."""
    kind = KINDS[results.kind]
    for name, columns, figures in [
        (SHARED, kind.shared, results.figures),
        *((row.name, kind.columns, row.figures) for row in results.rows),
    ]:
        units = _units(columns)
        for path, stored in numbers(figures):
            got = figure(found.get(name, {}), path)
            allowed = max(units.get(path, 0.0), kind.tolerance * abs(stored)) * (1 + 1e-9)
            if path not in units:
                continue
            if not isinstance(got, int | float):
                yield f"{name}: {path} was {stored:g}; now there is none"
            elif abs(got - stored) > allowed:
                yield f"{name}: {path} was {stored:g}; now {got:g}; allowed are ±{allowed:.2g}"


def _units(columns: Sequence[Column]) -> dict[str, float]:
    """One unit of the last decimal of each figure that is compared, by its path.

    Examples
    --------
    >>> _units([Column("static", ("{share:.1%}",)), Column("ours", ("{ours:.3g} {unit}",))])
    {'share': 0.001, 'ours': 0.0, 'unit': 0.0}
    """
    fields = dict(field for column in columns if column.checked for field in column.fields())
    return {path: _unit(spec) for path, spec in fields.items()}


def _unit(spec: str) -> float:
    digits = spec.rpartition(".")[2].rstrip("f%")
    if spec[-1:] not in ("f", "%") or not digits.isdigit():
        return 0.0
    return float(f"1e-{int(digits) + 2 * spec.endswith('%')}")


def _written(commands: Sequence[str], results: Results, data: Path | None) -> Any:
    """The JSON that the last command leaves."""
    kind = KINDS[results.kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in sorted(data.iterdir()) if data is not None else ():
            (folder / path.name).symlink_to(path)
        for file, text in results.files.items():
            (folder / file).unlink(missing_ok=True)  # a link to the data must not be written through
            (folder / file).write_text(text, encoding="utf-8")
        *before, last = commands
        for command in before:
            run_command(command, folder)
        printed = run_command(f"{last} {kind.suffix}".rstrip(), folder)
        if kind.output is not None:
            printed = _only(folder, kind.output).read_text(encoding="utf-8")
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(printed)
    raise UsageError(f"`{last}` left no JSON; got {printed[:80]!r}")


def _only(folder: Path, name: str) -> Path:
    found = [path for path in folder.rglob(name) if not path.is_symlink()]
    if len(found) != 1:
        raise UsageError(f"expected one {name} of the commands; got {len(found)}")
    return found[0]


def run_command(command: str, folder: Path) -> str:
    """Standard output of a command, run in a folder with the Python and the checkout of this process.

    Raises
    ------
    UsageError
        If it fails; it has said why on standard error.
    """
    say(f"$ {command}")
    words = shlex.split(command)
    own = words[2:] if words[:2] == ["python", "-m"] else ["kvgauge", *words[words[0] == "kvgauge" :]]
    models = Path(os.environ.get("KVGAUGE_MODELS") or CHECKOUT / "models").absolute()  # commands run elsewhere
    done = subprocess.run(
        [sys.executable, "-m", *own],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "KVGAUGE_MODELS": str(models)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UsageError(f"`{command}` ended with status {done.returncode}")
    return done.stdout
