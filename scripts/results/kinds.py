"""Kinds of tables: their columns, and the place of the figures in what the programs write."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from scripts.results.schema import Figures, KindName, ResultsError, Row

_FIELD = re.compile(r"\{([^}:]+)(?::([^}]*))?\}")


@dataclass(frozen=True)
class Column:
    """A column; of several forms the first counts whose figures are all there.

    A figure that is not `checked` may move: seconds, or what is published elsewhere. Words stand at the left.
    """

    head: str
    forms: tuple[str, ...]
    checked: bool = True
    words: bool = False

    def cell(self, figures: Figures) -> str:
        """The text of a cell; empty where a figure is missing."""
        return next((text for form in self.forms if (text := filled(form, figures))), "")

    def fields(self) -> list[tuple[str, str]]:
        """Paths of figures and how they are written."""
        return [(path, spec) for form in self.forms for path, spec in _FIELD.findall(form)]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A table and the output that it is read from.

    Parameters
    ----------
    first : str
        Head of the first column, the names of the rows.
    columns : sequence of Column
        The others.
    shared : sequence of Column
        Figures of the whole file, for a line above the table.
    suffix : str
        What the last command is given so that it writes JSON.
    output : str or None
        Name of the file it writes, somewhere in its folder; None if it prints the JSON.
    rows : str or None
        Place of the rows in the JSON, a list or an object; None if all of it is one row.
    name : str
        What a row of a list is called by.
    code : bool
        Whether names of rows are set as code.
    tolerance : float
        Share by which a figure may move; one unit of its last decimal is always allowed.
    """

    first: str
    columns: Sequence[Column]
    shared: Sequence[Column] = ()
    suffix: str = ""
    output: str | None = "results.json"
    rows: str | None = "rows"
    name: str = "name"
    code: bool = False
    tolerance: float = 0.005

    def label(self, row: Row) -> str:
        """The first cell: the name, with a star if scales look at later tokens."""
        star = " *" if row.figures.get("causal") is False else ""
        return f"`{row.name}`" if self.code else row.name + star

    def read(self, written: Mapping[str, Any], row_name: str) -> dict[str, Figures]:
        """Figures by row in the JSON of a program; `row_name` names the row if all of the JSON is one."""
        if self.rows is None:
            return {row_name: kept(self.columns, written)}
        found = written[self.rows]
        named = found if isinstance(found, Mapping) else {entry[self.name]: entry for entry in found}
        return {name: kept(self.columns, entry) for name, entry in named.items()}


def kept(columns: Sequence[Column], written: Mapping[str, Any]) -> Figures:
    """Figures that the columns show, and the mark for a causal recipe, nested as they were."""
    found: dict[str, Any] = {}
    for path in [*(path for column in columns for path, _ in column.fields()), "causal"]:
        value = figure(dict(written), path)
        if value is None:
            continue
        place, *names = path.split(".")[::-1]
        inner = found
        for name in names[::-1]:
            inner = inner.setdefault(name, {})
        inner[place] = value
    return found


def figure(figures: JsonValue, path: str) -> JsonValue:
    """Figure at a dotted path; None if there is none."""
    for name in path.split("."):
        figures = figures.get(name) if isinstance(figures, dict) else None
    return figures


def filled(form: str, figures: Figures) -> str:
    """A text whose places became figures; empty where one is missing.

    Examples
    --------
    >>> filled("{bits.key:.2f} / {bits.value:.2f}", {"bits": {"key": 4, "value": 4.5}})
    '4.00 / 4.50'
    >>> filled("{bits.key:.2f} / {bits.value:.2f}", {"bits": {"key": 4}})
    ''
    """
    values = [figure(figures, path) for path, _ in _FIELD.findall(form)]
    if any(value is None for value in values):
        return ""
    return _FIELD.sub(lambda found: _text(figure(figures, found[1]), found[2] or "", found[1]), form)


def _text(value: JsonValue, spec: str, path: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    try:
        return format(value, spec)
    except (TypeError, ValueError) as error:
        raise ResultsError(f"{path}: {value!r} cannot be written as {spec!r}") from error


_PERPLEXITY = Column("perplexity", ("{quantized.perplexity:.3f}",))
_NATS = Column("loss in nats", ("{loss_nats:.4f} ± {loss_nats_stderr:.4f}", "{loss_nats:.4f}"))
_KL = Column("KL", ("{kl_mean:.4f}",))

KINDS: Mapping[KindName, Kind] = {
    "evaluated": Kind(
        first="FLAGS",
        columns=(
            _PERPLEXITY,
            Column("mean bits", ("{bits.average:.2f}",)),
            _NATS,
            _KL,
            Column("bits, keys / values", ("{bits.key:.2f} / {bits.value:.2f}",)),
            Column("published", ("{published:.4g}",), checked=False),
        ),
        shared=(
            Column("perplexity in full precision", ("{fp.perplexity:.5g}",)),
            Column("targets", ("{n_targets:,}",)),
        ),
        suffix="--json",
        output=None,
        rows=None,
        code=True,
    ),
    "demo": Kind(
        first="codes",
        columns=(
            Column("bits, keys / values", ("{bits.key:.2f} / {bits.value:.2f}",)),
            Column("perplexity in full precision", ("{fp.perplexity:.3f}",)),
            _PERPLEXITY,
            _NATS,
            _KL,
        ),
    ),
    "compared": Kind(
        first="recipe",
        columns=(
            Column("keys", ("{bits.key:.2f}",)),
            Column("values", ("{bits.value:.2f}",)),
            Column("mean", ("{bits.average:.2f}",)),
            Column("2K", ("{amortised.2048:.2f}",)),
            Column("32K", ("{amortised.32768:.2f}",)),
            Column("128K", ("{amortised.131072:.2f}",)),
            Column("nats", _NATS.forms),
            Column("KL", ("{kl_mean:.4f} ± {kl_mean_stderr:.4f}", *_KL.forms)),
            Column("KL 99.9 %", ("{kl_p999:.3f}",)),
            Column("flips", ("{top1_flips:.2%}",)),
            Column("logits", ("{worst.logits:.4f}",)),
            Column("output", ("{worst.output:.4f}",)),
            Column("static", ("{costs.static_share:.1%}",)),
            Column("decode", ("{decode_share:.1%}",)),
            Column("fit", ("{fit_seconds:.2f}",), checked=False),
            Column("evaluate", ("{seconds:.1f}",), checked=False),
        ),
        shared=(
            Column("perplexity in full precision", ("{perplexity:.4f}",)),
            *(
                Column(f"seconds of {what}", (form,), checked=False)
                for what, form in (
                    ("gathering statistics, keys before RoPE", "{seconds.gather.pre_rope:.1f}"),
                    ("gathering statistics, keys after RoPE", "{seconds.gather.post_rope:.1f}"),
                    ("bare forward passes of the calibration windows", "{seconds.bare.calibration:.1f}"),
                    ("bare forward passes of the scored windows", "{seconds.bare.evaluation:.1f}"),
                )
            ),
        ),
        rows="recipes",
    ),
    "tasks": Kind(
        first="task",
        columns=(
            Column("full precision", ("{fp:.3f} ± {fp_stderr:.3f}", "{fp:.3f}")),
            Column("quantized", ("{quantized:.3f} ± {quantized_stderr:.3f}", "{quantized:.3f}")),
        ),
        suffix="--json",
        output=None,
        rows="tasks",
    ),
    "ablated": Kind(
        first="without",
        columns=(Column("nats that it is worth", ("{nats:+.4f} ± {stderr:.4f}", "{nats:+.4f}")),),
        output="ablation.json",
        rows="ingredients",
        name="ingredient",
    ),
    "benchmark": Kind(
        first="what",
        columns=(
            Column("ours", ("{ours:.4g} {unit}", "{ours:.4g}")),
            Column("baseline", ("{baseline:.4g} {unit}", "{baseline:.4g}")),
            Column("ratio", ("{ratio:.3g}",)),
            Column("target", ("at least {at_least:.3g}", "at most {at_most:.3g}")),
            Column("met", ("{met}",)),
        ),
        suffix="--json results.json",
        tolerance=0.3,
    ),
    "saved_cache": Kind(
        first="cache",
        columns=(
            Column("share of the bytes", ("{share:.3f}",)),
            Column("saved, tokens a second", ("{save_tokens_per_second:,.0f}",)),
            Column("loaded, tokens a second", ("{load_tokens_per_second:,.0f}",)),
        ),
        suffix="--json results.json",
        tolerance=0.3,
    ),
    "limits": Kind(
        first="limit or recipe",
        columns=(
            Column("bits", ("{bits.key:.2f} / {bits.value:.2f}",)),
            Column("distortion, dB", ("{decibels.key:.1f} / {decibels.value:.1f}",)),
            *(
                Column(f"above {limit}", (f"{{above.{limit}.key:.1f}} / {{above.{limit}.value:.1f}}",))
                for limit in ("head", "layer", "predicted")
            ),
        ),
        suffix="--json results.json",
    ),
    "families": Kind(
        first="family",
        columns=(
            Column("found", ("{verdict}",), words=True),
            Column("layers", ("{layers}",)),
            Column("reason", ("{why}",), words=True),
        ),
        shared=tuple(
            Column(verdict, (f"{{counts.{verdict}}}",))
            for verdict in ("applied", "simulated", "refused", "not built", "wrong")
        ),
        suffix="--json results.json",
        rows="families",
        code=True,
        tolerance=0.0,
    ),
}
