"""Where the figures of a report come from: model, text, artifact, versions, machine."""

import hashlib
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from artifacts.artifact import Artifact
from artifacts.manifest import tool_version
from artifacts.storage import canonical_json
from kvgauge.report.reported_run import ReportedRun
from kvgauge.running.machine import hardware


def origins(run: ReportedRun) -> dict[str, Any]:
    """As JSON values; no path but what was typed."""
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
