"""Differences between the pages and the results."""

from pathlib import Path

from scripts.results.blocks import block_names, filled_page, first_difference, pages
from scripts.results.plots import PLOTS, pareto_svg
from scripts.results.schema import ResultsError, load_all


def problems(checkout: Path) -> list[str]:
    """One line for each page, plot or file that is not as it should be.

    Parameters
    ----------
    checkout : Path
        With README.md, docs/ and docs/results/.
    """
    try:
        found = load_all(checkout / "docs" / "results")
    except ResultsError as error:
        return [str(error)]
    lines, shown = [], set[str]()
    for page in pages(checkout):
        text = page.read_text(encoding="utf-8")
        shown |= {name.partition("/")[0] for name in block_names(text)}
        try:
            difference = None if filled_page(text, found) == text else first_difference(text, found)
        except ResultsError as error:
            difference = str(error)
        if difference is not None:
            lines.append(f"{page.relative_to(checkout)}: {difference}")
    lines += [f"docs/results/{name}.json: no page shows it" for name in found if name not in shown]
    for file, name in PLOTS.items():
        path = checkout / "docs" / file
        if name not in found:
            lines.append(f"docs/{file}: there is no docs/results/{name}.json to draw it from")
        elif not path.exists() or path.read_bytes() != pareto_svg(found[name]):
            lines.append(f"docs/{file}: not as docs/results/{name}.json draws it")
    return lines
