"""Sections of the page on storage and on provenance."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from kvgauge.report.drawing import drawings
from kvgauge.report.drawing.markup import Markup, element, figure, paragraphs, section, table
from kvgauge.report.drawing.numbers import context, plain, size
from kvgauge.report.drawing.picture import picture

Found = Mapping[str, Any]


def memory(found: Found) -> Markup:
    """Bytes over context length."""
    rows = found["memory"]
    if not rows:
        return section("memory", "Memory", paragraphs("No text was evaluated, so that nothing was counted."))
    words = "; ".join(
        f"{context(row['context_tokens'])} tokens: {size(row['total_bytes'])} for {size(row['exact_16_bit_bytes'])}"
        for row in rows
    )
    drawn = picture("memory", words, (5.4, 3.6), partial(drawings.memory, rows))
    caption = "One sequence's cache over its length. Codes, exact tokens and static bytes, against 16 bits per element."
    return section("memory", "Memory over context length", figure(drawn, caption), _table(rows))


def provenance(found: Found) -> Markup:
    """Model, artifact, texts, versions and machine, and the command."""
    origins = found["origins"]
    rows = [*_model(origins), *_artifact(origins["artifact"]), *_runs(found), *_machine(origins)]
    facts = element("div", table("Everything the figures depend on", ("what", "which"), rows), class_="words")
    command = element("pre", element("code", found["command"]))
    return section("provenance", "Provenance", facts, element("h3", "Command"), command)


def _table(rows: list[Found]) -> Markup:
    head = ("tokens", "keys", "values", "of these static", "together", "16 bits per element", "times smaller")
    cells = [
        (
            context(row["context_tokens"]),
            *(size(row[f"{name}_bytes"]) for name in ("key", "value", "static", "total", "exact_16_bit")),
            plain(row["times_smaller"]),
        )
        for row in rows
    ]
    caption = "Counted from what was stored on the evaluated text and carried on to these lengths, for one sequence"
    return table(caption, head, cells)


def _model(origins: Found) -> Iterator[tuple[str, str]]:
    model = origins["model"]
    kind = f"{model['model_type']}, {model['n_layers']} layers"
    yield "model", f"{model['name']}: {kind}, {model['dtype']} on {model['device']}"
    yield "model fingerprint", model["fingerprint"]


def _artifact(artifact: Found | None) -> Iterator[tuple[str, str]]:
    if artifact is None:
        yield "artifact", "none: dynamic scales"
        return
    corpus = artifact["calibration"]
    yield "artifact digest", artifact["digest"]
    yield "recipe", f"{artifact['recipe']}: {artifact['source']}, fitted by kvgauge {artifact['tool_version']}"
    yield (
        "calibrated on",
        f"{corpus['text']}, {corpus['n_windows']} windows of {corpus['seqlen']} tokens, seed {corpus['seed']}, "
        f"digest {corpus['digest']}",
    )


def _runs(found: Found) -> Iterator[tuple[str, str]]:
    for name, result in found["texts"].items():
        yield f"evaluated on {name}", f"{result['protocol']}; {result['seconds']:.1f} s"
    for protocol in dict.fromkeys(task["protocol"] for task in found["tasks"].values()):
        yield (
            "tasks",
            f"{', '.join(n for n, task in found['tasks'].items() if task['protocol'] == protocol)}: {protocol}",
        )
    if found["lm_eval"]:
        yield "lm-eval", found["lm_eval"]["protocol"]
    windows = found["origins"]["error_windows"]
    yield "single layers", f"{windows['n_windows']} windows, {windows['n_tokens']} tokens"


def _machine(origins: Found) -> Iterator[tuple[str, str]]:
    yield "versions", ", ".join(f"{name} {number}" for name, number in origins["versions"].items())
    yield "hardware", origins["hardware"]
    yield "written", origins["written"]
