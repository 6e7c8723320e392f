"""Files as other tools write them: same objects, same shapes, same pickle protocol."""

import json
import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, CHANNELS, TOKENS = 2, 16, 40


def kvquant_levels(bits: int, seed: int = 0) -> list[np.ndarray]:
    """One unsorted column of cluster centres in a list, as sklearn and KVQuant leave them."""
    levels = np.random.default_rng(seed).uniform(-1, 1, (2**bits, 1)).astype(np.float32)
    return [levels]


def kvquant_content(more: tuple[object, ...] = (), name: str = "model.layers.{}.self_attn.{}_proj") -> dict:
    """Keys with ends for each channel, values with ends for each calibration token, and what comes behind them."""
    torch.manual_seed(0)
    content: dict[str, tuple[object, ...]] = {}
    for layer in range(LAYERS):
        for tensor, shape in (("k", (1, CHANNELS)), ("v", (TOKENS, 1))):
            upper = torch.rand(shape) + 0.5
            content[name.format(layer, tensor)] = (upper, upper - 1.5 - torch.rand(shape), *more)
    return content


def simquant_content(levels: Tensor | None, dummies: tuple[object, ...] = ()) -> dict:
    """LLaMA3-simquant's: numpy vectors, levels in units of the activations."""
    rng = np.random.default_rng(0)
    content: dict[str, tuple[object, ...]] = {}
    for layer in range(LAYERS):
        for tensor, length in (("k", CHANNELS), ("v", TOKENS)):
            upper = rng.uniform(1, 2, length).astype(np.float32)
            content[f"model.layers.{layer}.self_attn.{tensor}_proj"] = (upper, -upper - 0.5, levels, *dummies)
    return content


def write_pickle(path: Path, content: object, protocol: int = pickle.HIGHEST_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_msmodelslim(
    folder: Path, dtype: torch.dtype = torch.float32, *, label: str = "C8", shards: int = 1, symmetric: bool = False
) -> Path:
    """Scales and offsets beside a weight, in one file or in several with an index."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": torch.rand(4, 4)}
    for layer in range(LAYERS):
        for tensor in "kv":
            place = f"model.layers.{layer}.self_attn.{tensor}_proj"
            offset = torch.zeros(CHANNELS) if symmetric else torch.randint(-100, 100, (CHANNELS,)).float()
            tensors[f"{place}.kv_cache_scale"] = ((torch.rand(CHANNELS) + 0.1) / 64).to(dtype)
            tensors[f"{place}.kv_cache_offset"] = offset.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, tensors, shards)
    description = {name: label if "kv_cache" in name else "FLOAT" for name in tensors}
    (folder / "quant_model_description.json").write_text(
        json.dumps({**description, "kv_cache_type": "C8", "kv_quant_type": "C8", "version": "1.0.0"}, indent=4)
    )
    return folder


def _write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "quant_model_weights.safetensors")
        return
    names = sorted(tensors)
    files = {
        name: f"quant_model_weights-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
