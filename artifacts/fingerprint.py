"""What identifies a model as far as its cache is concerned."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from artifacts.attention import AttentionLayer
from artifacts.evidence import text_config


def model_fingerprint(
    model: nn.Module, layers: Iterable[AttentionLayer], tokenizer_digest: str | None
) -> dict[str, Any]:
    """Facts that must agree for quantizers to fit: shapes, rotation, layer count, vocabulary, tokenizer.

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
    """SHA-256 of a tokenizer's pieces and their numbers."""
    sha = hashlib.sha256()
    for piece, number in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        sha.update(f"{number} {piece}\n".encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def _plain(value: Any) -> Any:
    """JSON values only: mappings as dictionaries, sequences as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
