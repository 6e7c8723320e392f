"""Settings that the scores of an evaluation depend on, as JSON: a log of windows must agree with all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.manifest import tool_version
from artifacts.model.attention import AttentionLayer
from artifacts.model.fingerprint import arrays_digest, model_fingerprint, quantizers_digest, weights_digest
from simquant.evaluation.evaluation_run import EvaluationRun
from simquant.evaluation.scored_targets import ScoredTargets


def evaluation_settings(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    runs: Sequence[EvaluationRun],
    batches: Sequence[Int64[Tensor, "_ tokens"]],
    scored: ScoredTargets,
) -> dict[str, Any]:
    """Settings by name, so that errors can name those that differ.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    layers : Sequence[AttentionLayer]
        Attention layers of the model.
    runs : Sequence[EvaluationRun]
        Quantizers and protocols.
    batches : sequence of Int64[Tensor, "windows tokens"]
        Windows, in batches.
    scored : ScoredTargets
        Targets that count.
    """
    # Digests rather than values: the header of a log stays small, and tells only which of these differ. The device and
    # the torch version are included, as both change rounding.
    weight = next(model.parameters())
    return {
        "model": model_fingerprint(model, layers, None),
        "weights": weights_digest(model),
        "dtype": str(weight.dtype),
        "device": weight.device.type,
        "windows": arrays_digest(batch.cpu().numpy() for batch in batches),
        "batch_sizes": [len(batch) for batch in batches],
        "stride": scored.stride,
        "scored": arrays_digest([np.array(scored.n_scored)]),
        "quantizers": [quantizers_digest(run.quantizers) for run in runs],
        "protocols": [repr(run.protocol) for run in runs],
        "versions": {"kvgauge": tool_version(), "torch": str(torch.__version__)},
    }
