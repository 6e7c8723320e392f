"""WikiText cut at titles of articles, so that calibration, choosing of settings and scoring share no article.

From the checkout: `python -m scripts.real.parts wikitext2-test.txt` writes `calibration.txt`, `choosing.txt` and
`scoring.txt` into the working directory. The first half of the characters is for calibration; from there to 67 % is for
whoever compares settings; the rest is for scoring alone.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from kvgauge.terminal.console import Parser, UsageError, run
from kvgauge.terminal.outputs import replace_text

PARTS = ("calibration", "choosing", "scoring")

_SHARES = (0.5, 0.67)

_TITLE = re.compile(r"^ = [^=\n].*[^=] = *\n", re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("parts", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser("python -m scripts.real.parts", __doc__)
    parser.add_argument("text", type=Path, metavar="FILE", help="text with titles of articles such as ` = Title = `")
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    write_parts(args.text, Path())
    return 0


def write_parts(text: Path, folder: Path) -> list[Path]:
    """Writes the three parts of a file into a folder, and returns their paths.

    Raises
    ------
    UsageError
        If the file cannot be read, or has too few titles.
    """
    try:
        found = dict(zip(PARTS, parts(text.read_text(encoding="utf-8"), str(text)), strict=True))
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{text}: cannot be read: {error}") from error
    paths = [folder / f"{name}.txt" for name in found]
    for path, part in zip(paths, found.values(), strict=True):
        replace_text(path, part)
    return paths


def parts(text: str, name: str = "the text") -> Sequence[str]:
    """The three parts, cut at the titles nearest to 50 % and 67 % of the characters; `name` is for errors.

    Raises
    ------
    UsageError
        If one of them would be empty.

    Examples
    --------
    >>> [part.split()[1] for part in parts("".join(f" = {name} = \\nwords\\n" for name in "Ab Cd Ef Gh Ij Kl".split()))]
    ['Ab', 'Gh', 'Ij']
    """
    titles = [title.start() for title in _TITLE.finditer(text)]
    cuts = [_nearest(titles, share * len(text)) for share in _SHARES]
    found = [text[start:end] for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True)]
    if not all(found):
        raise UsageError(
            f"{name}: expected articles in three parts of it, by titles such as ` = Title = `; got {len(titles)}"
        )
    return found


def _nearest(titles: Sequence[int], place: float) -> int:
    return min(titles, key=lambda start: abs(start - place), default=0)


if __name__ == "__main__":
    sys.exit(main())
