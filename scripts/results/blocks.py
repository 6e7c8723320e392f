"""Blocks of pages: found, filled, and compared with what they should hold."""

import re
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path

from scripts.results.kinds import filled
from scripts.results.schema import Results, ResultsError
from scripts.results.tables import fenced, markdown_table, results_text

_BLOCK = re.compile(r"(?<!`)<!-- results: ([^>]+?) -->(.*?)<!-- (/results|results: [^>]+?) -->", re.DOTALL)
_OPEN = re.compile(r"(?<!`)<!-- results: ([^>]+?) -->")
_HEADLINE = ("kivi-4", "kvquant-4", "kvquant-3", "eigen-fisher", "predictive-fisher", "predictive-fisher-entropy")
_REAL = (
    "predictive",
    "kvquant-2-1pct",
    "default-3",
    "kvquant-3-1pct",
    "default",
    "kvquant-4-1pct",
    "llama-cpp-q4-0",
    "kivi-4",
    "fp8",
)

Found = Mapping[str, Results]


def demo_text(found: Found) -> str:
    """`make demo` and the table that it prints."""
    from kvgauge.cli.demo import BITS, table

    rows = [dict(found["demo"].row(f"{bits} bits").figures) for bits in BITS]
    return f"```\n$ make demo\n{table(BITS, rows)}\n```"


def headline_text(found: Found) -> str:
    """Bits and losses of a few recipes on both models."""
    models = {"stories260K": found["compare-stories260k"], "bundled model": found["compare-demo"]}
    heads = ["recipe", *(head for model in models for head in (f"{model}: bits", "nats lost"))]
    forms = ("{bits.average:.2f}", "{loss_nats:.4f} ± {loss_nats_stderr:.4f}")
    rows = [
        [f"`{name}`", *(filled(form, one.row(name).figures) for one in models.values() for form in forms)]
        for name in _HEADLINE
    ]
    commands = [command for one in models.values() for command in one.commands]
    return f"{fenced(commands, '')}\n\n{markdown_table([heads, ['---', *4 * ['--:']], *rows])}"


def smollm2_text(found: Found) -> str:
    """Bits and losses of a few recipes on a real model, without the columns that a first look can do without."""
    heads = ("recipe", "bits", "nats lost", "KL", "flips")
    forms = ("{bits.average:.2f}", "{loss_nats:.4f} ± {loss_nats_stderr:.4f}", "{kl_mean:.4f}", "{top1_flips:.1%}")
    one = found["compare-smollm2"]
    rows = [[f"`{name}`", *(filled(form, one.row(name).figures) for form in forms)] for name in _REAL]
    return f"{fenced(one.commands, '')}\n\n{markdown_table([heads, ['---', *4 * ['--:']], *rows])}"


SPECIAL_BLOCKS: Mapping[str, Callable[[Found], str]] = {
    "demo": demo_text,
    "headline": headline_text,
    "smollm2": smollm2_text,
}
"""Blocks that are not the table of one file."""


def filled_page(text: str, found: Found) -> str:
    """A page whose blocks hold what the results say.

    Raises
    ------
    ResultsError
        If a block has no end, or a name that stands for nothing.
    """
    unclosed = set(block_names(text)) - {block[1] for block in _BLOCK.finditer(text) if block[3] == "/results"}
    if unclosed:
        raise ResultsError(f"block {min(unclosed)} has no end; close it with <!-- /results -->")
    return _BLOCK.sub(lambda block: _filled(block[1], found), text)


def block_names(text: str) -> list[str]:
    """Names of a page's blocks, in order."""
    return _OPEN.findall(text)


def first_difference(text: str, found: Found) -> str | None:
    """The first line of a page that differs from the results, and its block; None if none does."""
    for block in _BLOCK.finditer(text):
        pairs = zip_longest(block[0].splitlines(), _filled(block[1], found).splitlines(), fillvalue="")
        first_line = text[: block.start()].count("\n") + 1
        for number, (own, expected) in enumerate(pairs, first_line):
            if own != expected:
                return f"line {number}, block {block[1]}: expected {expected!r}; got {own!r}"
    return None


def _filled(name: str, found: Found) -> str:
    start, end = f"<!-- results: {name} -->", "<!-- /results -->"
    return f"{start}{_figure(name, found)}{end}" if "/" in name else f"{start}\n\n{_text(name, found)}\n\n{end}"


def _text(name: str, found: Found) -> str:
    if name in SPECIAL_BLOCKS:
        return SPECIAL_BLOCKS[name](found)
    return results_text(_file(name, name, found))


def _figure(name: str, found: Found) -> str:
    """One figure: file, row and its form, between slashes."""
    file, _, rest = name.partition("/")
    row, _, form = rest.rpartition("/")
    text = filled(f"{{{form}}}", _file(file, name, found).row(row).figures)
    if not text:
        raise ResultsError(f"block {name}: the row {row!r} has no figure {form.partition(':')[0]!r}")
    return text


def _file(file: str, block: str, found: Found) -> Results:
    if file not in found:
        known = ", ".join(sorted({*found, *SPECIAL_BLOCKS}))
        raise ResultsError(f"block {block}: there is no docs/results/{file}.json; known are {known}")
    return found[file]


def pages(checkout: Path) -> list[Path]:
    """README and everything under docs/, for what holds a block."""
    candidates = [checkout / "README.md", *sorted((checkout / "docs").rglob("*.md"))]
    return [page for page in candidates if block_names(page.read_text(encoding="utf-8"))]
