"""A checkpoint's files: what is no model that can be run, and weights that the model has no place for."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_CONSTANTS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|masked_bias|(attn|attention)\.bias|"
    r"(en|de)coder\.version)$"
)
"""Tables that older releases of transformers saved, and newer ones compute."""

_CACHE_SCALES = re.compile(r"[._](k|v|q|kv|prob)(_cache)?_(scale|offset|zero_point)$")
"""Scales that serving engines apply to a quantized cache; the weights are whole without them."""

_OTHER_PARTS = re.compile(
    r"^(model\.|language_model\.)?(\w*(vision|visual|image|audio|speech)\w*|multi_modal_\w+|mm_\w+|connector|mtp|talker|"
    r"token2wav|code2wav|v_head|value_head|score|classifier)\."
)
"""Towers for pictures and sound, heads for other tasks: what a language model does not call."""

_QUANTIZED = re.compile(
    r"(weight_scale\w*|scale_weight|scale_inv|(input|act\w*)_scale|weight_packed|weight_shape|weight_zero_point|qweight|"
    r"qzeros|scales|zeros|g_idx|SCB|absmax|quant_map|blocks)$"
)
"""Tensors of quantized weights."""

_WEIGHTS = (".safetensors", ".bin", ".index.json")


def holds_weights(folder: Path) -> bool:
    """True for a folder with weights as transformers writes them."""
    return any(file.name.endswith(_WEIGHTS) for file in folder.iterdir())


def other_format(name: str, offline: bool) -> str | None:
    """Says what a path holds instead of a whole model, and what to do; None for a model.

    Parameters
    ----------
    name : str
        Folder, file or hub id.
    offline : bool
        Whether the hub does not answer, so that only its local cache is looked at.
    """
    path = Path(name)
    if path.is_file():
        return f"is a file. A model is a .gguf file, or a folder with config.json and its weights: pass {path.parent}"
    adapter = _adapter(name, offline)
    return None if adapter is None else _of_adapter(name, adapter)


def remote_code(name: str, offline: bool) -> str | None:
    """Reason for not running a model that brings code of its own; None where it brings none."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, local_files_only=offline)
    except (OSError, ValueError):
        return None
    if not config.get("auto_map"):
        return None
    return (
        f"{name}: its model type {config.get('model_type')!r} is not part of transformers but code that comes with the "
        "model (auto_map in config.json). Such code is never run: it could do anything on this machine, and nobody has "
        "looked at its attention. Take a version of the model whose config.json names a model type of transformers."
    )


def check_weights(name: str, model: str, loading: Mapping[str, Iterable[Any]]) -> list[str]:
    """Refuses a checkpoint that does not belong to the model, and returns the weights that it can do without.

    Parameters
    ----------
    name : str
        Of the model, as it was typed.
    model : str
        Its class.
    loading : mapping
        `missing_keys`, `unexpected_keys` and `mismatched_keys`, as `from_pretrained` reports them.

    Raises
    ------
    OSError
        If weights are missing, have other shapes, or have no place in the model.
    """
    missing = sorted(loading["missing_keys"])
    if missing:
        raise OSError(
            f"{name}: {len(missing)} weights are missing from its files, such as {missing[0]}; they would be random. "
            "Restore or download the model again."
        )
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise OSError(
            f"{name}: {len(mismatched)} weights have other shapes than config.json says, such as {key}: {list(found)}, "
            f"expected {list(expected)}; they would be random. Put the config.json there that belongs to the weights."
        )
    # Weights that a model has no place for are mostly a sign of the wrong config.json, under which it runs and answers
    # badly. Three kinds are harmless: tables that are computed, other towers and heads, scales of a serving cache.
    unexpected = sorted(key for key in loading["unexpected_keys"] if not _CONSTANTS.search(key))
    spare = [key for key in unexpected if _OTHER_PARTS.search(key) or _CACHE_SCALES.search(key)]
    _check_used(name, model, sorted({*unexpected} - {*spare}))
    return spare


def _check_used(name: str, model: str, unused: list[str]) -> None:
    """Refuses weights that would be left out.

    Raises
    ------
    OSError
        With one of them, and what to do.
    """
    quantized = [key for key in unused if _QUANTIZED.search(key)]
    if quantized:
        raise OSError(
            f"{name}: its weights are quantized, and {model} would read them without their scales: nothing in "
            f"config.json (quantization_config) says what {len(quantized)} tensors are for, such as {quantized[0]}. "
            "Take the checkpoint in bfloat16, or the config.json that belongs to this one."
        )
    if unused:
        raise OSError(
            f"{name}: {len(unused)} weights in its files have no place in {model}, such as {unused[0]}; it would "
            "run without them. Put the config.json there that belongs to the weights. If it is right without them, "
            "save it so: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER)."
        )


def _adapter(name: str, offline: bool) -> str | None:
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name, local_files_only=offline)
    except (OSError, ValueError):  # of a model that is not there the caller tells
        return None


def _of_adapter(name: str, adapter: str) -> str:
    try:
        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return (
        f"is an adapter (adapter_config.json) of {base or 'a base model'}, no whole model. Merge it first: python -c "
        f"\"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{name}').merge_and_unload()"
        ".save_pretrained('merged')\", put the base model's tokenizer files beside it, and pass merged"
    )
