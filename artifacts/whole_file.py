"""Atomic file writes."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file atomically, replacing an earlier one, with the permissions that the umask leaves.

    A temporary sibling takes the content, is flushed to disk and then renamed. Without the flush the rename may reach
    the disk first, and a loss of power leaves an empty file under the final name.

    Raises
    ------
    OSError
        If the folder takes no new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, as a rename is atomic within one file system only; O_EXCL with a random name never follows a link.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise OSError(f"{path}: cannot write into {path.parent} ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _flush(path.parent)


def _flush(folder: Path) -> None:
    """Flushes the rename itself to disk, where the file system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
