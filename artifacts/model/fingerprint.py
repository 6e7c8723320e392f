"""Fingerprints of models, and digests of weights and quantizers, to match a file with a model."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from artifacts.model.attention import AttentionLayer
from artifacts.model.evidence import text_config
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.storage import Stored

_SAMPLED_WEIGHTS = 64
"""Weights of each parameter in the digest: two trained models agree in none of them."""


def model_fingerprint(
    model: nn.Module, layers: Iterable[AttentionLayer], tokenizer_digest: str | None
) -> dict[str, Any]:
    """Properties that must agree for quantizers to fit: shapes, RoPE, number of layers, vocabulary, tokenizer.

    Parameters
    ----------
    model : nn.Module
        With a transformers configuration as `model.config`.
    layers : Iterable[AttentionLayer]
        Its attention layers.
    tokenizer_digest : str or None
        SHA-256 of the tokenizer's vocabulary, where there is a tokenizer.
    """
    config = text_config(model)
    layers = tuple(layers)
    return {
        "model_type": config.model_type,
        "n_layers": len(layers),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "heads": [[layer.q_heads, layer.kv_heads, layer.head_dim] for layer in layers],
        "rope": _plain(getattr(config, "rope_parameters", None)),
        "sliding_window": [layer.sliding_window for layer in layers],
        **({"tokenizer": tokenizer_digest} if tokenizer_digest else {}),
    }


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 of the pieces of a tokenizer and their ids."""
    sha = hashlib.sha256()
    for piece, number in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        # A vocabulary may contain lone surrogates, which strict UTF-8 cannot encode.
        sha.update(f"{number} {piece}\n".encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def quantizers_digest(quantizers: Mapping[Site, Quantizer]) -> str:
    """SHA-256 of specifications and tensors of quantizers, whatever file they came from."""
    header = {str(site): quantizer.spec.to_json() for site, quantizer in quantizers.items()}
    arrays = {
        f"{site}/{name}": tensor.detach().cpu().numpy()
        for site, quantizer in quantizers.items()
        for name, tensor in quantizer.tensors().items()
    }
    return Stored(format="kvgauge.quantizers", header=header, arrays=arrays).digest


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a few weights of every parameter; parameters on the meta device are left out."""
    return arrays_digest(_sample(weight) for weight in model.parameters() if not weight.is_meta)


def _sample(weight: Tensor) -> Any:
    # Equally spaced, so that a change anywhere in a row or column of a large matrix is likely to be seen.
    step = max(1, weight.numel() // _SAMPLED_WEIGHTS)
    return weight.detach().flatten()[::step].double().cpu().numpy()


def arrays_digest(arrays: Iterable[Any]) -> str:
    """SHA-256 of arrays: their dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {array.shape}".encode())
        sha.update(np.asarray(array, order="C").data)
    return sha.hexdigest()


def _plain(value: Any) -> Any:
    """JSON values only: mappings as dictionaries, sequences as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
