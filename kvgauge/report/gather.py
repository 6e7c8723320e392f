"""Everything that a report shows, as JSON values."""

import hashlib
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from artifacts.artifact import Artifact
from artifacts.manifest import tool_version
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.storage import canonical_json
from kvgauge.report.compared import compared
from kvgauge.report.findings.site_findings import FIRST_POSITIONS, Seen, drift, look, site_rows
from kvgauge.report.findings.views import value_views, worst_sites
from kvgauge.report.reported_run import ReportedRun
from kvgauge.report.verdict import verdict
from kvgauge.running.machine import hardware

_EXACT_BYTES = 2

FORMAT = "kvgauge.report"

VERSION = 2


def origins(run: ReportedRun) -> dict[str, Any]:
    """Model, artifact, versions and machine as JSON values; no path but the one that was typed."""
    fingerprint = run.loaded.fingerprint(run.loaded.layers())
    weight = next(run.loaded.model.parameters())
    return {
        "model": {
            "name": run.model,
            "fingerprint": hashlib.sha256(canonical_json(fingerprint).encode()).hexdigest(),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            **{name: fingerprint[name] for name in ("model_type", "n_layers", "hidden_size", "vocab_size")},
        },
        "artifact": _artifact(run.quantizers) if isinstance(run.quantizers, Artifact) else None,
        "error_windows": {"n_windows": len(run.windows), "n_tokens": run.windows.numel()},
        "versions": {
            "kvgauge": tool_version(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "hardware": hardware(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _artifact(artifact: Artifact) -> Mapping[str, Any]:
    manifest = artifact.manifest
    corpus = manifest.corpus
    return {
        "digest": artifact.digest,
        "recipe": manifest.recipe.get("name"),
        "source": manifest.recipe.get("source"),
        "tool_version": manifest.tool_version,
        "calibration": {
            "text": corpus.name,
            "digest": corpus.digest,
            "n_windows": corpus.n_windows,
            "n_tokens": corpus.n_tokens,
            "seqlen": corpus.seqlen,
            "seed": corpus.seed,
        },
    }


def memory(result: Mapping[str, Any], quantizers: Mapping[Site, Quantizer]) -> list[dict[str, Any]]:
    """Bytes of one sequence by context length: codes, exact tokens and static bytes, against 16 bits per element.

    Parameters
    ----------
    result : mapping
        `EvalResult.to_json`.
    quantizers : mapping from Site to Quantizer
        Those that were evaluated.
    """
    channels = {
        tensor: sum(quantizer.channels for site, quantizer in quantizers.items() if site.tensor == tensor)
        for tensor in ("key", "value")
    }
    return [_row(int(n), bits, channels, result["bits"]) for n, bits in result["bits"]["amortised"].items()]


def _row(n_tokens: int, bits: Mapping[str, float], channels: Mapping[str, int], stored: Mapping[str, Any]) -> Any:
    # bits are per element, static bytes spread over the tokens included: bytes = bits * tokens * channels / 8.
    key, value = (round(bits[tensor] * n_tokens * channels[tensor] / 8) for tensor in ("key", "value"))
    exact = _EXACT_BYTES * n_tokens * sum(channels.values())
    return {
        "context_tokens": n_tokens,
        "key_bytes": key,
        "value_bytes": value,
        "static_bytes": sum(stored["static_bytes"].values()),
        "total_bytes": key + value,
        "exact_16_bit_bytes": exact,
        "times_smaller": exact / (key + value),
    }


def gather(run: ReportedRun) -> dict[str, Any]:
    """The figures of a report: those of the run, and what a look at single layers and their values adds.

    Raises
    ------
    UsageError
        If the file to compare with is not what `kvgauge compare` writes.
    """
    result = next(iter(run.results.values()), None)
    others = None if run.compared is None else compared(run.compared, result)
    layers = run.loaded.layers()
    seen = look(run, layers)
    rows = site_rows(run, layers, seen)
    chosen = worst_sites(rows)
    found = {
        "format": FORMAT,
        "version": VERSION,
        "command": run.command,
        "origins": origins(run),
        "texts": {name: {**own, "perplexity_rise": _rise(own)} for name, own in run.results.items()},
        "tasks": dict(run.tasks),
        "lm_eval": run.lm_eval,
        "policy": run.settings["policy"].describe(),
        "sink_tokens": run.settings["policy"].sink_tokens,
        "sink_choice": _sink_choice(run.quantizers),
        "sites": rows,
        "chosen_sites": [str(site) for site in chosen],
        "norms": _norms(seen),
        "kept_by_channel": {
            str(site): (seen.kept[site] / seen.n_windows).tolist() for site in chosen if site in seen.kept
        },
        "drift": drift(run, rows),
        "memory": [] if result is None else memory(result, run.quantizers),
        "comparison": others,
        **value_views(run, layers, chosen),
    }
    found = _finite(found)
    return {**found, "verdict": verdict(found)}


def _sink_choice(quantizers: Artifact | Mapping[Site, Quantizer]) -> dict[str, Any] | None:
    """Why the artifact has its number of sink tokens, if it was chosen."""
    choice = quantizers.manifest.sink_choice if isinstance(quantizers, Artifact) else None
    return None if choice is None else asdict(choice)


def _rise(result: Mapping[str, Any]) -> float | None:
    before, after = result["fp"]["perplexity"], result["quantized"]["perplexity"]
    return None if before is None or after is None else after / before - 1


def _norms(seen: Seen) -> dict[str, dict[str, Any]]:
    """The median over later positions, and the first positions as multiples of it; means over windows."""
    found = {}
    for site, sums in seen.norms.items():
        norms = sums / seen.n_windows
        later = norms[FIRST_POSITIONS:] if len(norms) > FIRST_POSITIONS else norms
        # A median, because the mean would follow the few tokens with huge or tiny norms that are looked for.
        median = float(later.median())
        first = (norms[:FIRST_POSITIONS] / median).tolist() if median else []
        found[str(site)] = {"later_median": median, "first_over_later": first}
    return found


def _finite(value: Any) -> Any:
    """JSON values with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
