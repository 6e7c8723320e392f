"""Importer of msModelSlim's folder: a scale and an offset per channel of values and of keys after rotation.

The engine stores round(x / scale + offset) in 8 bits and reads (code - offset) * scale.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from torch import Tensor

from artifacts.errors import ArtifactError, CorruptArtifactError
from artifacts.importers.layer_names import text_sites
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.sites import Site
from artifacts.storage import naming

_DESCRIPTION = "quant_model_description.json"
_SCALE, _OFFSET = ".kv_cache_scale", ".kv_cache_offset"
_LOWEST, _HIGHEST = -128, 127


def is_folder(path: Path) -> bool:
    """True for a folder with file names of msModelSlim."""
    return any(path.glob("quant_model*")) or any(path.glob("kv_cache_scale.npy"))


def quantizers(path: Path) -> tuple[dict[Site, Quantizer], list[str]]:
    """Quantizers of the folder, and notices of assumptions.

    Raises
    ------
    CorruptArtifactError
        If files or tensors are missing or damaged, scales are zero, or the cache is not of 8 bits.
    """
    description = _description(path)
    scales, offsets = _tensors(path)
    promised = {name for name in description if re.search(r"\.kv_cache_(scale|offset)$", name)}
    missing = sorted(promised - {*scales, *offsets})
    if missing:
        raise CorruptArtifactError(
            f"{path}: expected all tensors that {_DESCRIPTION} lists; {len(missing)} are in no file, first {missing[0]}"
        )
    if not scales:
        raise CorruptArtifactError(
            f"{path}: expected tensors named *.k_proj.kv_cache_scale; got none. Was the cache quantized?"
        )
    _check_no_zeros(path, scales)
    with naming(path):
        places, notices = text_sites([name.removesuffix(_SCALE) for name in scales], "post_rope")
    found: dict[Site, Quantizer] = {}
    for site, place in places.items():
        scale = scales[place + _SCALE]
        found[site] = _affine(f"{path}: {place}", scale, offsets.get(place + _OFFSET, torch.zeros_like(scale)))
    without = [place for place in places.values() if place + _OFFSET not in offsets]
    return found, [*notices, *_notices(description, promised, without)]


def _affine(place: str, scale: Float32[Tensor, " channels"], offset: Float32[Tensor, " channels"]) -> Quantizer:
    if offset.shape != scale.shape or not torch.isfinite(offset).all() or not torch.isfinite(scale).all():
        raise CorruptArtifactError(
            f"{place}: expected finite scales and offsets of one shape; got {tuple(scale.shape)}, {tuple(offset.shape)}"
        )
    if (scale < 0).any() or (offset < _LOWEST).any() or (offset > _HIGHEST).any():
        raise CorruptArtifactError(
            f"{place}: expected positive scales and offsets from {_LOWEST} to {_HIGHEST}; got a smallest scale of "
            f"{float(scale.min()):.4g} and offsets from {float(offset.min()):.4g} to {float(offset.max()):.4g}"
        )
    # The engine's int8 code is q = round(x / scale + offset); ours is unsigned, q + 128: x ~ (q - offset) * scale =
    # (-128 - offset) * scale + (q + 128) * scale.
    return Affine(channels=len(scale), bits=8, scale=scale, offset=(_LOWEST - offset) * scale)


def _check_no_zeros(path: Path, scales: dict[str, Tensor]) -> None:
    zeros = {name: int((scale == 0).sum()) for name, scale in scales.items() if (scale == 0).any()}
    if zeros:
        rows = ", ".join(f"{name} ({count} of {len(scales[name])})" for name, count in list(zeros.items())[:6])
        raise CorruptArtifactError(
            f"{path}: scales must be positive; {len(zeros)} of {len(scales)} tensors have zeros: "
            f"{rows}. Calibrate again; a known defect of some writers leaves scales unset."
        )


def _description(path: Path) -> dict[str, object]:
    file = path / _DESCRIPTION
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptArtifactError(f"{file}: expected JSON; got {error!s:.80}") from error
    if not isinstance(found, dict):
        raise CorruptArtifactError(f"{file}: expected an object; got {type(found).__name__}")
    kind = found.get("kv_cache_type", found.get("kv_quant_type", "C8"))
    if kind != "C8":
        raise CorruptArtifactError(f"{file}: expected a cache of type C8 (8 bits); got {kind!r:.20}")
    return found


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {"scale": {}, "offset": {}}
    for file in _files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    if name.endswith((".kv_cache_scale", ".kv_cache_offset")):
                        found[name.rpartition("_")[2]][name] = opened.get_tensor(name).float().reshape(-1)
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptArtifactError(
                f"{file}: damaged or incomplete safetensors file ({error!s:.80}). Copy it again"
            ) from error
    return found["scale"], found["offset"]


def _files(path: Path) -> Iterator[Path]:
    files = sorted(path.glob("quant_model*.safetensors"))
    index = next(path.glob("quant_model*.index.json"), None)
    if index is not None:
        try:
            listed = {path / Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise CorruptArtifactError(f"{index}: expected a weight_map ({error!s:.80})") from error
        missing = sorted(listed - set(files))
        if missing:
            raise CorruptArtifactError(f"{index}: it lists {missing[0].name}, which does not exist")
    if not files:
        hint = "; the .npy variant is a pickle and is not read" if any(path.glob("kv_cache_*.npy")) else ""
        raise ArtifactError(f"{path}: expected quant_model_weights*.safetensors; got none{hint}")
    return iter(files)


def _notices(description: dict[str, object], promised: set[str], without_offset: list[str]) -> list[str]:
    notices = ["keys are quantized after RoPE, where msModelSlim calibrates them"]
    if not description:
        notices.append(f"{_DESCRIPTION} is missing: tensors were chosen by their names")
    labels = sorted({str(description[name]) for name in promised} - {"C8"})
    if labels:
        notices.append(f"the cache's tensors are labelled {', '.join(labels)}, the type of the weights: assumed C8")
    if without_offset:
        notices.append(f"{len(without_offset)} scales have no offset: assumed 0, symmetric")
    return notices
