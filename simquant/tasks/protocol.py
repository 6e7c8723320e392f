"""One line on how answers came about: the same line, the same way."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from artifacts.attention import AttentionLayer
from artifacts.fingerprint import model_fingerprint
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.policy import CachePolicy
from simquant.steps import Steps

_SHOWN = 12
"""Hexadecimal digits of a digest: two runs meet by chance once in 10^14."""
_WEIGHTS = 16
"""Values of each weight that tell models of one architecture apart."""


def prompt_digest(prompt: str) -> str:
    """A short digest of a prompt."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:_SHOWN]


def fp_line(model: nn.Module, layers: tuple[AttentionLayer, ...]) -> str:
    """Of the exact model."""
    return f"full precision; greedy; model {_model_digest(model, layers)}"


def quantized_line(
    model: nn.Module,
    layers: tuple[AttentionLayer, ...],
    quantizers: Mapping[Site, Quantizer],
    policy: CachePolicy,
    steps: Steps | None,
) -> str:
    """Of a model that answers through a packed cache."""
    stages = sorted({site.stage.replace("_rope", "-RoPE") for site in quantizers if site.stage})
    prompt = "the whole prompt in one step" if steps is None else f"the prompt {steps.describe()}"
    return "; ".join(
        [
            f"packed cache; {prompt}, {'exact prefill attention' if policy.exact_prefill else 'quantized prefill'}",
            f"keys {', '.join(stages)}",
            policy.describe(),
            "greedy",
            f"model {_model_digest(model, layers)}",
            f"quantizers {_quantizers_digest(quantizers)}",
        ]
    )


def _model_digest(model: nn.Module, layers: tuple[AttentionLayer, ...]) -> str:
    sha = hashlib.sha256(json.dumps(model_fingerprint(model, layers, None), sort_keys=True).encode())
    for name, weight in model.named_parameters():
        sha.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if not weight.is_meta:  # weights that accelerate has put aside
            sha.update(_bytes(weight.detach().flatten()[:_WEIGHTS]))
    return sha.hexdigest()[:_SHOWN]


def _quantizers_digest(quantizers: Mapping[Site, Quantizer]) -> str:
    sha = hashlib.sha256()
    for site in sorted(quantizers):
        sha.update(f"{site} {json.dumps(quantizers[site].spec.to_json(), sort_keys=True)}".encode())
        for name, tensor in sorted(quantizers[site].tensors().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))
    return sha.hexdigest()[:_SHOWN]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
