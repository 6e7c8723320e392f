"""Line that identifies a protocol of answers: equal lines mean the same model, quantizers, policy and decoding."""

import hashlib
from collections.abc import Mapping

from torch import nn

from artifacts.model.attention import AttentionLayer
from artifacts.model.fingerprint import model_fingerprint, quantizers_digest, weights_digest
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.storage import canonical_json
from simquant.evaluation.report import cache_phrases
from simquant.policy.policy import CachePolicy
from simquant.protocols.chunking import Chunking

_SHOWN = 12
"""Hexadecimal digits of a digest: two different inputs collide with probability 16^-12, about 10^-14."""


def prompt_digest(prompt: str) -> str:
    """Short digest of a prompt, as `prompt_text` gives it."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:_SHOWN]


def fp_line(model: nn.Module, layers: tuple[AttentionLayer, ...]) -> str:
    """Line of the model in full precision."""
    return f"full precision; greedy; model {_model_digest(model, layers)}"


def quantized_line(
    model: nn.Module,
    layers: tuple[AttentionLayer, ...],
    quantizers: Mapping[Site, Quantizer],
    policy: CachePolicy,
    chunking: Chunking | None,
) -> str:
    """Line of a model that answers with a packed cache."""
    prompt = "the whole prompt in one step" if chunking is None else f"the prompt {chunking.describe()}"
    return "; ".join(
        [
            f"packed cache; {prompt}, {policy.describe_prefill()}",
            *cache_phrases(quantizers, policy),
            "greedy",
            f"model {_model_digest(model, layers)}",
            f"quantizers {quantizers_digest(quantizers)[:_SHOWN]}",
        ]
    )


def _model_digest(model: nn.Module, layers: tuple[AttentionLayer, ...]) -> str:
    dtype = str(next(model.parameters()).dtype)
    facts = canonical_json([model_fingerprint(model, layers, None), dtype, weights_digest(model)])
    return hashlib.sha256(facts.encode()).hexdigest()[:_SHOWN]
