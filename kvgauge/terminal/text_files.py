"""Text files that are whole or not there."""

from pathlib import Path

from artifacts.whole_file import write_whole


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, replacing an earlier one."""
    write_whole(path, text.encode())
