"""All that the scores of an evaluation depend on, as JSON: what a log must agree with to be gone on with."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.attention import AttentionLayer
from artifacts.fingerprint import model_fingerprint
from artifacts.manifest import tool_version
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.storage import Stored
from simquant.evaluation.evaluation_run import EvaluationRun
from simquant.evaluation.scored_targets import ScoredTargets

_SAMPLED_WEIGHTS = 64
"""Weights of each parameter that are looked at: two trained models agree in none of them."""


def evaluation_settings(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    runs: Sequence[EvaluationRun],
    batches: Sequence[Int64[Tensor, "_ tokens"]],
    scored: ScoredTargets,
) -> dict[str, Any]:
    """By name, for messages that say what differs.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    layers : Sequence[AttentionLayer]
        Its attention layers.
    runs : Sequence[EvaluationRun]
        Quantizers and protocols.
    batches : sequence of Int64[Tensor, "windows tokens"]
        The windows, as they are run.
    scored : ScoredTargets
        Which targets count.
    """
    weight = next(model.parameters())
    return {
        "model": model_fingerprint(model, layers, None),
        "weights": weights_digest(model),
        "dtype": str(weight.dtype),
        "device": weight.device.type,
        "windows": _sha256(batch.cpu().numpy() for batch in batches),
        "batch_sizes": [len(batch) for batch in batches],
        "stride": scored.stride,
        "scored": _sha256([np.array(scored.n_scored)]),
        "quantizers": [quantizers_digest(run.quantizers) for run in runs],
        "protocols": [repr(run.protocol) for run in runs],
        "versions": {"kvgauge": tool_version(), "torch": str(torch.__version__)},
    }


def quantizers_digest(quantizers: Mapping[Site, Quantizer]) -> str:
    """SHA-256 of what the quantizers are, wherever they come from."""
    header = {str(site): quantizer.spec.to_json() for site, quantizer in quantizers.items()}
    arrays = {
        f"{site}/{name}": tensor.detach().cpu().numpy()
        for site, quantizer in quantizers.items()
        for name, tensor in quantizer.tensors().items()
    }
    return Stored(format="kvgauge.quantizers", header=header, arrays=arrays).digest


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a few weights of every parameter; those that are not in memory are left out."""
    return _sha256(_sample(weight) for weight in model.parameters() if not weight.is_meta)


def _sample(weight: Tensor) -> Any:
    step = max(1, weight.numel() // _SAMPLED_WEIGHTS)
    return weight.detach().flatten()[::step].double().cpu().numpy()


def _sha256(arrays: Any) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {array.shape}".encode())
        sha.update(np.asarray(array, order="C").data)
    return sha.hexdigest()
