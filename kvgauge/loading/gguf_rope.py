"""Scaled RoPE of GGUF files, which transformers leaves out of most architectures' configurations."""

from typing import Any

import torch
from torch import Tensor

from kvgauge.loading.gguf_file import GgufFile
from kvgauge.loading.rope_stretch import global_ropes

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every release of Llama 3.1, 3.2 and 3.3 has beside its factor."""


def complete_rope(config: Any, file: GgufFile) -> None:
    """Takes scaling from the file where the configuration has none: without it all positions would be wrong.

    Linear scaling is a factor in the header. That of Llama 3 is a tensor of divisors, from which the four parameters
    that made it are found, and checked.

    Parameters
    ----------
    config : PretrainedConfig
        Of the text model, as transformers has read it; changed in place.
    file : GgufFile
        The file.

    Raises
    ------
    OSError
        If the file scales RoPE in another way.
    """
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{file.architecture}.rope.scaling.factor", 1.0)
    if factor in (0.0, 1.0):  # llama.cpp takes both for none
        kind = "none"
    if (kind == "none" and not file.rope_tensors) or _is_scaled(config):
        return
    if kind == "linear" and not file.rope_tensors:
        for rope in global_ropes(config, file.path.name):
            rope.update(rope_type="linear", factor=factor)
    elif kind != "none" or file.rope_tensors != ["rope_freqs.weight"] or not _take_llama3(config, _divisors(file)):
        told = f"{kind} scaling by {factor:g}" if kind != "none" else file.rope_tensors[0]
        raise OSError(
            f"{file.path.name}: its RoPE is scaled ({told}), which transformers does not read from GGUF files of the "
            f"architecture {file.architecture!r}: all positions would be wrong. Pass the model's folder or hub id"
        )


def _is_scaled(config: Any) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_type = [rope for rope in parameters.values() if isinstance(rope, dict)] or [parameters]
    return any(rope.get("rope_type", "default") != "default" for rope in by_type)


def _take_llama3(config: Any, divisors: Tensor) -> bool:
    """Sets Llama 3's scaling if it makes these divisors; else leaves the configuration as it was, and returns false."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = dict(config.rope_parameters)
    # Frequencies below the lowest band are divided by the whole factor, all others by less.
    config.rope_parameters = {**plain, **_LLAMA3, "rope_type": "llama3", "factor": float(divisors.max())}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    channels = 2 * torch.arange(len(scaled)) / (2 * len(scaled))
    expected = plain["rope_theta"] ** -channels / scaled
    if len(divisors) == len(expected) and torch.allclose(divisors, expected, rtol=1e-4):
        return True
    config.rope_parameters = plain
    return False


def _divisors(file: GgufFile) -> Tensor:
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(file.path).tensors}
    return torch.tensor(tensors["rope_freqs.weight"].data).float()
