"""A model whose cache is compressed while it reads, without calibration, by a `CompressionConfig`."""

from collections.abc import Mapping
from typing import Any, Self, final

from artifacts.codes import Codes
from artifacts.coding.packing import unpack
from artifacts.model.transformers_release import cache_argument
from calib.capture import site_shapes
from calib.recipe.compression_config import compression_config as recipe_of
from calib.recipe.layer_choice import check
from calib.recipe.recipe import Recipe
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import LoadedModel, load_model
from simquant import CachePolicy, CacheStateError, PackedCache, packed_cache
from simquant.policy.checks import group_tokens
from simquant.usage import StoredBytes


@final
class CompressedModel:
    """A model that generates on packed caches with running scales, and counts what they hold.

    Every text has a cache and running statistics of its own, which go with it. Prompts are read in chunks; the first
    tokens and those that do not fill a chunk yet stay exact.

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
        self.model: Any = loaded.model
        self.tokenizer = loaded.tokenizer
        self._layers = loaded.layers()
        shapes = {shape.site: shape for shape in site_shapes(self._layers, recipe.stage)}
        estimators = check(recipe, list(shapes.values()))
        self._quantizers = {site: estimator.dynamic(shapes[site]) for site, estimator in estimators.items()}
        chunk_tokens = group_tokens(self._quantizers)
        self._policy = CachePolicy(sink_tokens=recipe.sink_tokens, block_tokens=chunk_tokens)
        self._prefill = {"prefill_chunk_size": chunk_tokens} if chunk_tokens > 1 else {}
        self.reset_compression_state()

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
        options = ModelConfig(model=model_id, device=device, dtype=dtype)
        return cls(load_model(options), compression_config)

    def generate(self, *args: Any, **options: Any) -> Any:
        """What the model's own `generate` returns, on a packed cache of its own."""
        with packed_cache(self.model, self._quantizers, policy=self._policy, layers=self._layers) as new_cache:
            cache = new_cache()
            result = self.model.generate(*args, **{**self._prefill, **options, **cache_argument(self.model, cache)})
        self._count(cache)
        return result

    def get_compression_stats(self) -> dict[str, float]:
        """Counted over the texts since the last reset, as their caches were at the end.

        Returns
        -------
        dict
            avg_key_bits and avg_value_bits per element, exact tokens and scales included; outlier_ratio, the share of
            a chunk's scales that belong to promoted channels; compression_ratio against the model's dtype.

        Raises
        ------
        CacheStateError
            If there was no text.
        """
        both = self._stored["key"] + self._stored["value"]
        if not both.n_elements:
            raise CacheStateError("get_compression_stats: no text has been generated since the last reset")
        return {
            "avg_key_bits": self._stored["key"].bits,
            "avg_value_bits": self._stored["value"].bits,
            "outlier_ratio": self._n_promoted / self._n_scales if self._n_scales else 0.0,
            "compression_ratio": 1 / both.memory_ratio,
        }

    def reset_compression_state(self) -> None:
        """Begins to count anew."""
        self._stored = {"key": StoredBytes(), "value": StoredBytes()}
        self._n_promoted = self._n_scales = 0

    def _count(self, cache: PackedCache) -> None:
        for layer in cache.layers:
            for site, store in layer.store.stores():
                self._stored[site.tensor] += StoredBytes.of([store])
                for codes in store.blocks:
                    n_promoted, n_scales = _promoted(codes)
                    self._n_promoted += n_promoted
                    self._n_scales += n_scales


def _promoted(codes: Codes) -> tuple[int, int]:
    """How many scales belong to promoted channels, and how many scales there are."""
    if "scale" not in codes.tensors:
        return 0, 0
    n_chunks, n_groups = codes.tensors["scale"].shape
    if "promoted" not in codes.tensors:
        return 0, n_chunks * n_groups
    return int(unpack(codes.tensors["promoted"], 1, n_groups).sum()), n_chunks * n_groups
