"""Sections of the page that tell results: verdict, losses, tasks, and the place among other recipes."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from kvgauge.report.drawing import drawings
from kvgauge.report.drawing.markup import Markup, Row, element, figure, paragraphs, section, table
from kvgauge.report.drawing.numbers import percent, plain, size, with_error
from kvgauge.report.drawing.picture import picture
from kvgauge.report.sections import tasks as task_sections
from kvgauge.terminal.pareto import Point

Found = Mapping[str, Any]


def verdict_box(found: Found) -> Markup:
    """The verdict, first thing on the page."""
    own = found["verdict"]
    return element(
        "div",
        element("p", own["headline"], class_="headline"),
        paragraphs(*own["notes"]),
        *(element("p", element("b", "Warning: "), text, class_="warning") for text in own["warnings"]),
        class_=f"verdict {own['state']}",
    )


def results(found: Found) -> Markup:
    """Losses on text and scores in tasks, with their errors."""
    texts, tasks = found["texts"], list(found["tasks"].values())
    pictures = [*([_losses(texts)] if texts else []), *([task_sections.scores(tasks)] if tasks else [])]
    return section(
        "results",
        "Results",
        element("div", *pictures, class_="pair"),
        *(_text_table(name, result) for name, result in texts.items()),
        *([task_sections.task_table(tasks)] if tasks else []),
        *([task_sections.harness_table(found["lm_eval"])] if found["lm_eval"] else []),
    )


def comparison(found: Found) -> Markup:
    """Nats over bits: this run, and the recipes of a comparison where there is one."""
    result = next(iter(found["texts"].values()), None)
    own = _own_point(result)
    others = found["comparison"]
    points = [] if others is None else [_point(row) for row in others["points"]]
    if not any(math.isfinite(point.nats) for point in (*([own] if own else []), *points)):
        return section("comparison", "Nats over counted bits", paragraphs("No finite loss was measured."))
    alt = "Nats lost per token over counted bits per element; full precision is the dashed line at zero."
    drawn = picture("pareto", alt, (9.0, 5.2) if points else (5.4, 3.4), partial(drawings.pareto, own, points))
    shown = figure(drawn, _pareto_caption(result, others), wide=bool(points))
    return section("comparison", "Nats over counted bits", shown, *_points(others))


def _losses(texts: Mapping[str, Found]) -> Markup:
    rows = [
        (f"{what}{f', {name}' if len(texts) > 1 else ''}", result[key], result[f"{key}_stderr"])
        for name, result in texts.items()
        for what, key in (("loss", "loss_nats"), ("KL to full precision", "kl_mean"))
        if result[key] is not None
    ]
    words = "; ".join(f"{name} {with_error(value, stderr)}" for name, value, stderr in rows)
    drawn = picture("losses", f"Nats per token: {words}", (5.4, 0.9 + 0.5 * len(rows)), partial(drawings.losses, rows))
    return figure(drawn, f"What is lost, in nats per token. {task_sections.WHISKERS}")


def _text_table(name: str, result: Found) -> Markup:
    fp, quantized, bits = result["fp"], result["quantized"], result["bits"]
    rows = [
        ("perplexity, full precision", with_error(fp["perplexity"], fp["perplexity_stderr"]), ""),
        ("perplexity, quantized", with_error(quantized["perplexity"], quantized["perplexity_stderr"]), ""),
        ("perplexity, change", percent(result["perplexity_rise"], signed=True), ""),
        ("loss", with_error(result["loss_nats"], result["loss_nats_stderr"]), "nats per token"),
        ("KL, mean", with_error(result["kl_mean"], result["kl_mean_stderr"]), "nats per token"),
        ("KL, 99th percentile", plain(result["kl_p99"]), "nats"),
        ("KL, 99.9th percentile", plain(result["kl_p999"]), "nats"),
        ("first choice changed", _percent(result, "top1_flips"), "% of tokens"),
        ("target's probability, rms change", _percent(result, "delta_p_rms"), "%"),
        ("target's probability, mean change", _percent(result, "delta_p_mean"), "%"),
        ("keys, stored", plain(bits["key"]), "bits per element"),
        ("values, stored", plain(bits["value"]), "bits per element"),
        ("both, exact tokens included", plain(bits["average"]), "bits per element"),
        *_costs(result),
        ("tokens quantized", plain(100 * result["quantized_fraction"]), "%"),
    ]
    caption = (
        f"{name}: {result['n_targets']} targets in {result['n_windows']} windows, ± one standard error over windows. "
        f"Protocol: {result['protocol']}."
    )
    return table(caption, ("figure", "value", "unit"), rows)


def _costs(result: Found) -> Iterator[Row]:
    """Of a token, all sites together, and what is stored once."""
    costs, work = result["costs"], "multiply-adds"
    if costs["model_multiply_adds"]:
        share = costs["decode_multiply_adds"] / costs["model_multiply_adds"]
        work += f", {percent(share)} of the linear layers'"
    yield "a token, all sites", f"{costs['bits_per_token']:,.0f}", "bits stored"
    yield "to decode a token", f"{costs['decode_multiply_adds']:,}", work
    static = sum(result["bits"]["static_bytes"].values())
    yield "static bytes", size(static), f"{percent(costs['static_share'])} of the weights"


def _own_point(result: Found | None) -> Point | None:
    return None if result is None else _point({"name": "this run", "bits": result["bits"]["average"], **result})


def _point(row: Found) -> Point:
    nats, stderr = (math.nan if row[key] is None else row[key] for key in ("loss_nats", "loss_nats_stderr"))
    bits = row["bits"]["average"] if isinstance(row["bits"], Mapping) else row["bits"]
    return Point(row["name"], bits, nats, stderr)


def _pareto_caption(result: Found | None, others: Found | None) -> str:
    base = "The dashed line is full precision; fewer bits and fewer nats are better. Bars are one standard error. "
    if others is None:
        return (
            base
            + "Only this run: add --report-compare with the results.json of `kvgauge compare` to see it among recipes."
        )
    known = f"Ringed: this run. The others are from {others['file']}, measured on {others['text']}"
    if others["same_text"]:
        return f"{base}{known}, with the same full-precision perplexity of {plain(others['fp_perplexity'], 5)}."
    own = "none here" if result is None else f"{plain(result['fp']['perplexity'], 5)} here"
    return (
        f"{base}{known}. OTHER WINDOWS OR MODEL: full-precision perplexity is {plain(others['fp_perplexity'], 5)} "
        f"there and {own}; compare losses with care."
    )


def _points(others: Found | None) -> Iterator[Markup]:
    if others is None:
        return
    rows = [
        (row["name"], plain(row["bits"]), with_error(row["loss_nats"], row["loss_nats_stderr"]))
        for row in sorted(others["points"], key=lambda row: float(row["bits"]))
    ]
    yield table("Recipes of the comparison", ("recipe", "bits per element", "nats lost per token"), rows)


def _percent(result: Found, name: str) -> str:
    value, stderr = result[name], result[f"{name}_stderr"]
    return with_error(None if value is None else 100 * value, None if stderr is None else 100 * stderr)
