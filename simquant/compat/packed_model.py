"""Model whose `generate` runs on packed caches and counts their bits, with running scales."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from artifacts.artifact import Artifact
from artifacts.codes import Codes
from artifacts.coding.packing import unpack
from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.cache.errors import CacheStateError
from simquant.cache.packed import packed_cache
from simquant.cache.transformers_cache import PackedCache
from simquant.policy.checks import group_tokens
from simquant.policy.policy import CachePolicy
from simquant.usage import StoredBytes


class PackedModel:
    """Model that generates on packed caches, and counts the bits that they store.

    Every text has a cache and running scales of its own. Prompts are read in chunks (chunked prefill); sinks, and
    tokens of a chunk that is not complete, are in full precision.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    quantizers : Artifact or mapping from Site to Quantizer
        One for the keys and one for the values of every layer.
    sink_tokens : int
        First tokens of each sequence kept in full precision.
    layers : sequence of AttentionLayer or None
        Result of `attention_layers(model)`; None computes it.
    """

    def __init__(
        self,
        model: nn.Module,
        quantizers: Artifact | Mapping[Site, Quantizer],
        *,
        sink_tokens: int = 0,
        layers: Sequence[AttentionLayer] | None = None,
    ) -> None:
        self.model: Any = model
        self._layers = attention_layers(model) if layers is None else layers
        self._quantizers = quantizers
        chunk_tokens = group_tokens(quantizers)
        self._policy = CachePolicy(sink_tokens=sink_tokens, block_tokens=chunk_tokens)
        self._prefill = {"prefill_chunk_size": chunk_tokens} if chunk_tokens > 1 else {}
        self.reset_compression_state()

    def generate(self, *args: Any, **options: Any) -> Any:
        """Result of the model's own `generate` with a new packed cache."""
        with packed_cache(self.model, self._quantizers, policy=self._policy, layers=self._layers) as new_cache:
            cache = new_cache()
            result = self.model.generate(*args, **{**self._prefill, **options, **cache_argument(self.model, cache)})
        self._count(cache)
        return result

    def get_compression_stats(self) -> dict[str, float]:
        """Statistics of the caches of all texts since the last reset, taken at the end of each text.

        Returns
        -------
        dict
            avg_key_bits and avg_value_bits per element, full-precision tokens and scales included; outlier_ratio, the
            share of a chunk's scales that belong to promoted channels; compression_ratio against the model's dtype.

        Raises
        ------
        CacheStateError
            If no text has been generated.
        """
        both = self._stored["key"] + self._stored["value"]
        if not both.n_elements:
            raise CacheStateError(
                "get_compression_stats: expected texts since the last reset; got none. Call generate first"
            )
        return {
            "avg_key_bits": self._stored["key"].bits,
            "avg_value_bits": self._stored["value"].bits,
            "outlier_ratio": self._n_promoted / self._n_scales if self._n_scales else 0.0,
            "compression_ratio": 1 / both.memory_ratio,
        }

    def reset_compression_state(self) -> None:
        """Sets all counts to zero."""
        self._stored = {"key": StoredBytes(), "value": StoredBytes()}
        self._n_promoted = self._n_scales = 0

    def _count(self, cache: PackedCache) -> None:
        for layer in cache.packed:
            for site, store in layer.store.stores():
                self._stored[site.tensor] += StoredBytes.of([store])
                for codes in store.blocks:
                    n_promoted, n_scales = _promoted(codes)
                    self._n_promoted += n_promoted
                    self._n_scales += n_scales


def _promoted(codes: Codes) -> tuple[int, int]:
    """Number of scales that belong to promoted channels, and of all scales."""
    if "scale" not in codes.tensors:
        return 0, 0
    n_chunks, n_groups = codes.tensors["scale"].shape
    if "promoted" not in codes.tensors:
        return 0, n_chunks * n_groups
    return int(unpack(codes.tensors["promoted"], 1, n_groups).sum()), n_chunks * n_groups
