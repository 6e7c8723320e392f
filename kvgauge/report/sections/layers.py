"""Sections of the page that look into the layers: errors, values, levels, outliers, and drift."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from artifacts.sites import Site
from kvgauge.report.drawing import drawings
from kvgauge.report.drawing.markup import Markup, Row, TableCell, element, figure, heat, paragraphs, section, table
from kvgauge.report.drawing.numbers import percent, plain, with_error
from kvgauge.report.drawing.picture import picture
from kvgauge.report.verdict import site_name

Found = Mapping[str, Any]

_SIZE = (5.4, 3.4)
_ERRORS = (
    ("key: logits", "key", "logit_error"),
    ("key: output", "key", "output_error"),
    ("value: output", "value", "output_error"),
    ("both: output", "key", "layer_output_error"),
)


def layers(found: Found) -> Markup:
    """Errors and losses, layer by layer."""
    n_windows = found["origins"]["error_windows"]["n_windows"]
    text = (
        f"Each layer is quantized alone, on {n_windows} windows, everything before it being exact. Errors are squared "
        "and relative: of logits, weighted by the queries that read them, over the variance of the exact logits; of "
        "the attention output over its exact energy. Losses are nats per token with their standard errors; shares are "
        "of the sum over sites, which is the whole loss only where all losses are small."
    )
    if any(row["predicted"] for row in found["sites"].values()):
        text += " Layers that are predicted from other layers cannot stand alone, so that their errors are not known."
    return section("layers", "Where the error sits", paragraphs(text), _error_table(found), _loss_table(found))


def ranges(found: Found) -> Markup:
    """Channels of the worst sites, before and after rotation."""
    names = " and ".join(site_name(name) for name in found["chosen_sites"])
    text = f"The sites that cost most: {names}. Rotation mixes pairs of channels."
    return section("ranges", "Ranges of channels", paragraphs(text), _pair(_ranges(found["ranges"])))


def levels(found: Found) -> Markup:
    """Levels over the values of the evaluated text."""
    drawn = [_levels(number, name, row) for number, (name, row) in enumerate(found["levels"].items()) if row]
    without = [site_name(name) for name, row in found["levels"].items() if not row]
    note = f"No levels to show for the {' and the '.join(without)}: their grids scale with the tokens."
    return section("levels", "Levels over values", paragraphs(note if without else ""), _pair(drawn))


def exact(found: Found) -> Markup:
    """Positions and channels kept exact, and norms by position, which show sinks."""
    kept = {name: row["kept_fraction"] for name, row in found["sites"].items() if row["kept_fraction"] is not None}
    outliers = (
        f"Values beside the codes: {percent(min(kept.values()))} to {percent(max(kept.values()))} of a site's values."
        if kept
        else "No values are kept beside the codes."
    )
    drawn = [_kept(number, *item) for number, item in enumerate(found["kept_by_channel"].items())]
    return section(
        "exact",
        "Sinks and outliers",
        paragraphs(f"Tokens: {found['policy']}. {outliers}"),
        *_sink_choice(found["sink_choice"]),
        *(_norms(found, tensor) for tensor in ("key", "value")),
        _pair(drawn),
    )


def drift(found: Found) -> Markup:
    """Values beyond the fitted ranges."""
    columns = ("clipped_fraction", "calibrated_clipped_fraction", "kept_fraction")
    rows: list[Row] = [
        [_row_name(name), *(_share(row[column]) for column in columns)] for name, row in found["sites"].items()
    ]
    if all(row["clipped_fraction"] is None for row in found["sites"].values()):
        return section("drift", "Drift", paragraphs("No range is static: every token brings its own, none can drift."))
    text = f"{found['drift'] or 'No site leaves its fitted range more often than calibration leads to expect'}."
    if all(row["calibrated_clipped_fraction"] is None for row in found["sites"].values()):
        text += " The calibration text is not at hand to compare with."
    head = ("site", "this text", "calibration text", "kept exact, this text")
    caption = (
        "Share of values beyond the static range; where outliers are kept exact, these are kept and cost bits. None: "
        "no static range, or no outliers kept."
    )
    return section("drift", "Drift from the calibration text", paragraphs(text), table(caption, head, rows))


def _error_table(found: Found) -> Markup:
    by_layer = _by_layer(found["sites"])
    columns = [[pair[tensor][key] for pair in by_layer.values()] for _, tensor, key in _ERRORS]
    cells = [[TableCell(percent(value), heat(value, _largest(column))) for value in column] for column in columns]
    rows: list[Row] = [[f"layer {layer}", *row] for layer, row in zip(by_layer, zip(*cells, strict=True), strict=True)]
    return table("Relative squared errors; colour by column", ("", *(name for name, _, _ in _ERRORS)), rows)


def _loss_table(found: Found) -> Markup:
    by_layer = _by_layer(found["sites"])
    rows: list[Row] = [
        [f"layer {layer}", *(cell for tensor in ("key", "value") for cell in _loss_cells(pair[tensor]))]
        for layer, pair in by_layer.items()
    ]
    head = ("", "keys: nats", "share", "KL", "values: nats", "share", "KL")
    return table("Losses of sites quantized alone; colour by share", head, rows)


def _loss_cells(row: Found) -> Iterator[TableCell]:
    yield TableCell(with_error(row["loss_nats"], row["loss_nats_stderr"]))
    yield TableCell(percent(row["loss_share"]), row["loss_share"])
    yield TableCell(plain(row["kl_mean"], 2))


def _by_layer(sites: Mapping[str, Found]) -> dict[int, dict[str, Found]]:
    found: dict[int, dict[str, Found]] = {}
    for name, row in sites.items():
        site = Site.parse(name)
        found.setdefault(site.layer, {})[site.tensor] = row
    return found


def _ranges(rows: Sequence[Found]) -> Iterator[Markup]:
    for number, row in enumerate(rows):
        when = {"pre_rope": ", before rotation", "post_rope": ", after rotation", "": ""}[row["stage"]]
        title = f"{site_name(row['site'])}{when}".capitalize()
        widest = max(high - low for low, high in zip(row["minimum"], row["maximum"], strict=True))
        alt = f"{title}: range of {len(row['minimum'])} channels, the widest {plain(widest)}"
        where = " Quantized here." if row["quantized_here"] and when else ""
        static = "" if row["static_low"] is None else " Red: its range, beyond which values saturate or are kept exact."
        drawn = picture(f"ranges{number}", alt, _SIZE, partial(drawings.ranges, row))
        yield figure(drawn, f"{title}, {row['n_tokens']} tokens.{where}{static}")


def _levels(number: int, name: str, row: Found) -> Markup:
    title = f"{site_name(name)}: {row['what']}".capitalize()
    alt = f"{title}; {row['n_levels']} levels from {plain(row['low'])} to {plain(row['high'])}"
    drawn = picture(f"levels{number}", alt, _SIZE, partial(drawings.levels, row))
    shown = ", ".join(plain(level) for level in row["levels"]) if len(row["levels"]) <= 16 else ""
    return figure(drawn, f"{title}. {row['n_levels']} levels{f': {shown}' if shown else ''}.")


def _kept(number: int, name: str, shares: Sequence[float]) -> Markup:
    top = max(range(len(shares)), key=lambda channel: shares[channel])
    words = (
        f"{site_name(name).capitalize()}: channel {top}, as its quantizer sees them, has most outliers, "
        f"{percent(shares[top])} of its values."
    )
    return figure(picture(f"kept{number}", words, (5.4, 2.6), partial(drawings.kept_channels, shares)), words)


def _norms(found: Found, tensor: str) -> Markup:
    own = {name: row for name, row in found["norms"].items() if Site.parse(name).tensor == tensor}
    n_first = max(len(row["first_over_later"]) for row in own.values())
    sinks = found["sink_tokens"]
    head = ("", *(f"{place}{' exact' if place < sinks else ''}" for place in range(n_first)), "later, median")
    rows: list[Row] = [
        [
            f"layer {Site.parse(name).layer}",
            *map(_norm, row["first_over_later"]),
            plain(row["later_median"]),
        ]
        for name, row in own.items()
    ]
    return table(f"Norms of {tensor}s at the first positions, times the median of later ones", head, rows)


def _sink_choice(choice: Found | None) -> Iterator[Markup]:
    """Reason for the number of first tokens that the artifact keeps exact, if it was chosen, with its figures."""
    if choice is None:
        return
    yield paragraphs(f"Chosen by calibration: {choice['reason']}.")
    if choice["errors"]:
        rows: list[Row] = [
            ["squared error, relative", *(plain(error) for error in choice["errors"])],
            ["bits a value", *(f"{bits:.3f}" for bits in choice["bits"])],
        ]
        head = ("first tokens exact", *map(str, range(len(choice["errors"]))))
        yield table("Weighted error and counted bits by the number of exact first tokens, 2,048 in all", head, rows)


def _norm(ratio: float) -> TableCell:
    """Coloured by how many times smaller or larger than usual."""
    # As unusual when it is half as large as when it is twice as large.
    unusual = max(ratio, 1 / ratio) - 1 if ratio else 1.0
    return TableCell(f"{ratio:.2f}", heat(unusual, 4.0))


def _row_name(name: str) -> str:
    site = Site.parse(name)
    return f"layer {site.layer}, {site.tensor}s"


def _largest(values: Sequence[float | None]) -> float:
    return max((value for value in values if value is not None), default=0.0)


def _share(value: float | None) -> str:
    return "none" if value is None else percent(value)


def _pair(parts: Iterator[Markup] | Sequence[Markup]) -> Markup:
    return element("div", *parts, class_="pair")
