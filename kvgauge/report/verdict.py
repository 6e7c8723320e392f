"""Verdict of a report, in plain words."""

from collections.abc import Iterator, Mapping
from typing import Any

from artifacts.sites import Site
from kvgauge.report.drawing.numbers import percent, plain, with_error

Found = Mapping[str, Any]

_SURE = 2
"""Standard errors from zero at which a difference is told for one: chance reaches them once in twenty times."""

_ADDING_UP = 0.25
"""By how much of the loss the sites' own may miss it in sum, for a share of these to be told as a share of it."""

_FEW_WINDOWS = 10
_DILUTED = 0.9


def verdict(found: Found) -> dict[str, Any]:
    """A headline, what belongs to it, and warnings.

    `state` is `cost`, `none` (a loss within two standard errors of zero), `better` (than full precision, beyond them),
    `unknown` (no standard error) or `broken` (no finite loss).
    """
    texts = found["texts"]
    if not texts:
        return {
            "state": "cost",
            "headline": _of_tasks(found["tasks"], found["lm_eval"]),
            "notes": [],
            "warnings": list(_warnings(found)),
        }
    result = next(iter(texts.values()))
    state = _state(result)
    return {
        "state": state,
        "headline": _headline(result, state),
        "notes": [*_notes(found, result, state), *_other_texts(texts), *map(_task_line, found["tasks"].values())],
        "warnings": list(_warnings(found)),
    }


def site_name(name: str) -> str:
    """`keys of layer 3`."""
    site = Site.parse(name)
    return f"{site.tensor}s of layer {site.layer}"


def _state(result: Found) -> str:
    loss, stderr = result["loss_nats"], result["loss_nats_stderr"]
    if loss is None or result["quantized"]["perplexity"] is None:
        return "broken"
    if stderr is None:
        return "unknown"
    # About a 95 % interval, if means over windows are close to normal.
    if abs(loss) <= _SURE * stderr:
        return "none"
    return "cost" if loss > 0 else "better"


def _headline(result: Found, state: str) -> str:
    bits = f"{plain(result['bits']['average'])} bits per element"
    loss = f"{with_error(result['loss_nats'], result['loss_nats_stderr'])} nats per token"
    before, after = result["fp"]["perplexity"], result["quantized"]["perplexity"]
    if state == "broken":
        return f"{bits}: the loss is not a finite number. The quantized cache does not work on this text."
    change = f"{percent(result['perplexity_rise'], signed=True)} perplexity ({plain(before, 4)} to {plain(after, 4)})"
    match state:
        case "none":
            return f"{bits}: no loss can be told from zero, {loss}. {_bound(result)}"
        case "unknown":
            return f"{bits} change the loss by {loss}, {change}. One window tells no standard error."
        case "better":
            return f"{bits} seem better than full precision: {loss}, {change}. Do not believe it yet."
        case _:
            return f"{bits} cost {loss}, {change}."


def _bound(result: Found) -> str:
    """Largest loss that remains possible where the measured one is within its error of zero."""
    most = result["loss_nats"] + _SURE * result["loss_nats_stderr"]
    if not most:
        return "It is zero on every window."
    return f"Up to {plain(most, 2)} nats cannot be excluded (two standard errors)."


def _notes(found: Found, result: Found, state: str) -> Iterator[str]:
    kl = f"KL to full precision is {with_error(result['kl_mean'], result['kl_mean_stderr'])} nats per token"
    flips = f"the first choice changes for {percent(result['top1_flips'])} of the tokens"
    if state in ("cost", "unknown"):
        yield from _carrier(found["sites"], result["loss_nats"])
    if state == "better":
        yield (
            "Losing information does not improve a model: this is chance, a text that suits the error, or a bug. "
            f"Evaluate other text and look at the divergence: {kl}."
        )
    if state == "none" and not result["kl_mean"]:
        yield "The distributions are those of full precision."
    elif state == "none":
        better = "Perplexity is below that of full precision, which is noise. " if result["loss_nats"] < 0 else ""
        yield f"{better}The answers differ all the same: {kl}, and {flips}."


def _carrier(sites: Mapping[str, Found], whole: float) -> Iterator[str]:
    name = max(sites, key=lambda name: sites[name]["loss_share"] or 0.0)
    top = sites[name]
    alone = f"{with_error(top['loss_nats'], top['loss_nats_stderr'])} nats when quantized alone"
    together = sum(max(0.0, row["loss_nats"] or 0.0) for row in sites.values())
    if top["loss_nats"] is None or not top["loss_share"]:
        yield "No site loses anything that can be told when quantized alone."
    elif top["loss_nats_stderr"] is not None and top["loss_nats"] <= _SURE * top["loss_nats_stderr"]:
        yield f"No single site stands out of the noise; the largest loss is that of the {site_name(name)}, {alone}."
    # To first order in the errors, losses of single sites add up to that of all. Where errors interact they do not, and
    # a share of their sum is no share of the loss.
    elif abs(together - whole) <= _ADDING_UP * abs(whole):
        yield f"The {site_name(name)} carry {percent(top['loss_share'])} of it: {alone}."
    else:
        yield (
            f"The {site_name(name)} carry {percent(top['loss_share'])} of what single sites lose: {alone}. "
            f"Losses do not add up here: one by one the sites lose {plain(together)} nats, all at once {plain(whole)}."
        )


def _other_texts(texts: Mapping[str, Found]) -> Iterator[str]:
    for name, result in list(texts.items())[1:]:
        loss = with_error(result["loss_nats"], result["loss_nats_stderr"])
        yield f"On {name}: {loss} nats per token."


def _of_tasks(tasks: Mapping[str, Found], lm_eval: Found | None) -> str:
    harness = [
        f"{task}, {metric}: {plain(row['fp'])} in full precision, {plain(row['quantized'])} quantized."
        for task, metrics in (lm_eval["tasks"] if lm_eval else {}).items()
        for metric, row in metrics.items()
    ]
    return " ".join(["No text was evaluated.", *map(_task_line, tasks.values()), *harness])


def _task_line(task: Found) -> str:
    difference = with_error(task["difference"], task["difference_stderr"])
    before, after = plain(task["fp"]), plain(task["quantized"])
    return f"{task['task']}: {before} in full precision, {after} quantized (difference {difference}, n = {task['n']})."


def _warnings(found: Found) -> Iterator[str]:
    if found["drift"]:
        yield found["drift"] + "."
    for name, result in found["texts"].items():
        yield from (f"{name}: {warning}" for warning in result["warnings"])
        if "NOT CAUSAL" in result["protocol"]:
            yield f"{name}: scales look at later tokens, which no cache can do: the figures are too good."
        if 0 < result["quantized_fraction"] < _DILUTED:
            share = percent(result["quantized_fraction"])
            yield f"{name}: only {share} of the cached tokens were quantized, which dilutes the loss."
        if 1 < result["n_windows"] < _FEW_WINDOWS:
            yield f"{name}: {result['n_windows']} windows are few; standard errors from them are rough themselves."
