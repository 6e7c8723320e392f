"""Output files, and checks before a model runs that they can be written."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.whole_file import write_whole
from kvgauge.terminal.console import UsageError


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, replacing an earlier one."""
    write_whole(path, text.encode())


if TYPE_CHECKING:
    from calib.recipe.recipe import Recipe


def default_output(source: str, recipe: "Recipe") -> Path:
    """A path under `runs/` for an artifact, named after a model or other source, the recipe and its bits."""
    key, value = (_bits(entry) for entry in (recipe.key, recipe.value))
    return Path("runs") / f"{source}-{recipe.name}" / f"quantizers-k{key}v{value}.safetensors"


def _bits(entry: Any) -> int:
    """Code width of an estimator, or of what a wrapper holds; 16 where there is none."""
    while not hasattr(entry, "bits") and hasattr(entry, "inner"):
        entry = entry.inner
    return int(getattr(entry, "bits", 16))


def output_folder(folder: Path, option: str = "--output") -> Path:
    """The folder, made where it does not exist.

    Raises
    ------
    UsageError
        If there can be no such folder, or none to write to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder}: cannot make this folder ({error.strerror}); choose another") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {folder}: no permission to write there; choose another folder")
    return folder


def check_outputs(output: Path, statistics: Path | None, *, force: bool) -> None:
    """The artifact and the statistics can be written, and to different files.

    Raises
    ------
    UsageError
        If not, or if a file exists and --force is not given.
    ArtifactError
        If a suffix is neither of the two that can be written.
    """
    if statistics and statistics.resolve() == output.resolve():
        raise UsageError(f"--save-statistics and --quantizer-path both name {output}; give each its own file")
    for path in filter(None, (output, statistics)):
        _check_writable(path, force=force)


def _check_writable(path: Path, *, force: bool) -> None:
    from artifacts.storage import check_suffix, written_by_kvgauge

    check_suffix(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected the name of a file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; replace it with --force, or choose another name")
    if path.exists() and not written_by_kvgauge(path):
        raise UsageError(f"{path} was not written by kvgauge, so --force does not replace it; choose another name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: cannot write to {folder}: not a folder, or no permission; choose another")
