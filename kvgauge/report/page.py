"""The page, made from the JSON of a report and nothing else."""

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from kvgauge.configuration.model import short_name
from kvgauge.report.drawing.markup import Markup, element, text
from kvgauge.report.sections import layers as layer_sections
from kvgauge.report.sections import results as result_sections
from kvgauge.report.sections import storage as storage_sections
from kvgauge.report.sections import tasks as task_sections
from kvgauge.terminal.outputs import replace_text

_HERE = Path(__file__).parent
_SECTIONS = (
    result_sections.results,
    result_sections.comparison,
    layer_sections.layers,
    layer_sections.ranges,
    layer_sections.levels,
    layer_sections.exact,
    layer_sections.drift,
    task_sections.grids,
    storage_sections.memory,
    storage_sections.provenance,
)


def write_report(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes `report.json` and `report.html`, each whole or not at all, replacing earlier ones.

    Parameters
    ----------
    folder : Path
        Made where it does not exist.
    found : mapping
        What `gather` returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps(found, indent=1, allow_nan=False) + "\n"
    replace_text(folder / "report.json", written)
    replace_text(folder / "report.html", page(json.loads(written)))


def page(found: Mapping[str, Any]) -> str:
    """The HTML of a report; the same JSON gives the same page."""
    sections = [own for make in _SECTIONS if (own := make(found)) is not None]
    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=text(f"What a quantized cache costs {short_name(found['origins']['model']['name'])}"),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        verdict=result_sections.verdict_box(found),
        contents="".join(map(_entry, sections)),
        sections="\n".join(sections),
    )


def _entry(section: Markup) -> Markup:
    """A line of the contents, from the section's own heading."""
    name, _, rest = section.partition('<h2 id="')[2].partition('">')
    return element("li", element("a", Markup(rest.partition("</h2>")[0]), href=f"#{name}"))
