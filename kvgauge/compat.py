"""Models loaded by name with the caches of other systems: KIVI's, and one compressed while the model reads."""

from collections.abc import Mapping
from typing import Any, Self, final

from calib.fitting.dynamic import dynamic, dynamic_sinks
from calib.recipe.compression_config import compression_config as recipe_of
from calib.recipe.recipe import Recipe
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import LoadedModel, load_model
from simquant.compat.kivi import KIVISettings
from simquant.compat.kivi_patch import patch_model
from simquant.compat.packed_model import PackedModel


@final
class CompressedModel(PackedModel):
    """A model that generates on packed caches with running scales, by a `CompressionConfig`, without calibration.

    Parameters
    ----------
    loaded : LoadedModel
        The model.
    compression_config : mapping
        The seed's options by name, as `compression_config` takes them: `chunk_size`, `key_bits_normal`, ...

    Raises
    ------
    ValueError
        If options are unknown, out of range, or contradict one another.

    Examples
    --------
    >>> def reply(ids):
    ...     options = {"chunk_size": 512, "key_bits_normal": 4, "value_bits_normal": 4}
    ...     model = CompressedModel.from_pretrained("meta-llama/Llama-2-7b-hf", compression_config=options)
    ...     return model.generate(ids, max_new_tokens=50), model.get_compression_stats()
    """

    def __init__(self, loaded: LoadedModel, compression_config: Mapping[str, Any]) -> None:
        recipe = Recipe.parse(recipe_of(**compression_config), "compression_config")
        layers = loaded.layers()
        quantizers = dynamic(loaded.model, recipe, layers=layers)
        super().__init__(loaded.model, quantizers, sink_tokens=dynamic_sinks(recipe), layers=layers)
        self.tokenizer = loaded.tokenizer

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        *,
        compression_config: Mapping[str, Any],
        device: str | None = None,
        dtype: str = "auto",
    ) -> Self:
        """Loads a folder or hub id; device and dtype as in `load_with_kivi`."""
        return cls(load_model(ModelConfig(model=model_id, device=device, dtype=dtype)), compression_config)


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
