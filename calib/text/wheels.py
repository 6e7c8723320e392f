"""Wheels of the package index, downloaded by pip, which knows the user's index and proxies, and never run."""

import sys
from pathlib import Path

PIP_DOWNLOAD = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:")
"""Arguments of Python. Wheels only: building a source distribution would run its code."""


def download_command(*packages: str, folder: Path, options: tuple[str, ...] = ()) -> list[str]:
    """Command that puts packages into a folder, without their dependencies.

    Parameters
    ----------
    *packages : str
        Requirements, such as `name==1.0`.
    folder : Path
        Where the wheels go.
    options : tuple of str
        Further options of pip.
    """
    return [sys.executable, *PIP_DOWNLOAD, *options, *packages, "--dest", str(folder)]
