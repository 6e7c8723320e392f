"""A model with KIVI's cache, loaded in one call."""

from typing import Any

from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import load_model
from simquant.compat.kivi import KIVISettings
from simquant.compat.kivi_patch import patch_model


def load_with_kivi(
    model_id: str, *, device: str | None = None, dtype: str = "auto", auto_inject_cache: bool = True, **settings: int
) -> tuple[Any, Any]:
    """A model and its tokenizer; `generate` fills a fresh KIVI cache at each call.

    No code that comes with a model is ever run.

    Parameters
    ----------
    model_id : str
        Folder or hub id of a causal language model.
    device : str or None
        As torch names it, or 'auto' for accelerate's device map; None is CUDA where there is one.
    dtype : {'auto', 'float32', 'bfloat16', 'float16'}
        Of the model; 'auto' is as stored.
    auto_inject_cache : bool
        See `patch_model`.
    **settings
        k_bits, v_bits, group_size, residual_length: see `KIVISettings`.

    Raises
    ------
    OSError
        If there is no such model.
    ValueError
        If a setting is out of range.

    Examples
    --------
    >>> def reply(text):
    ...     model, tokenizer = load_with_kivi("Qwen/Qwen2-7B-Instruct", k_bits=2, v_bits=2)
    ...     inputs = tokenizer(text, return_tensors="pt").to(model.device)
    ...     return tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0])
    """
    KIVISettings(**settings)  # refused here rather than after a download
    loaded = load_model(ModelConfig(model=model_id, device=device, dtype=dtype))
    patch_model(loaded.model, auto_inject_cache=auto_inject_cache, **settings)
    return loaded.model, loaded.tokenizer
