"""Files of packed caches: save a cache, and load it to continue `generate()`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import ArtifactError, CorruptArtifactError, MismatchError, UnsupportedModelError
from artifacts.manifest import tool_version
from artifacts.model.fingerprint import model_fingerprint, quantizers_digest, weights_digest
from artifacts.storage import Stored, read, write
from simquant.cache.errors import CacheStateError
from simquant.cache.saving.cache_record import CacheReader, layer_record, tables_record
from simquant.cache.saving.tensor_pool import TensorPool
from simquant.cache.transformers_cache import PackedCache

FORMAT = "kvgauge.cache"
VERSION = 2
"""Version 1 had two layouts of mixed-radix words, and codes without the number of tokens that share a scale."""


@torch.no_grad()
def save_cache(cache: PackedCache, path: str | Path) -> None:
    """Writes a packed cache to a file: codes, full-precision tokens, positions, and the state of eviction.

    The file holds no token ids, but whoever has the model can recover the text from keys and values.

    Parameters
    ----------
    cache : PackedCache
        Cache between two steps.
    path : str or Path
        Path that ends in `.safetensors` or `.pkl`; written whole or not at all.

    Raises
    ------
    CacheStateError
        If an earlier step failed halfway.
    ArtifactError
        If the path has another suffix.

    Examples
    --------
    >>> from simquant import cache_argument
    >>> def pause(model, quantizers, ids, path):
    ...     with packed_cache(model, quantizers) as new_cache:
    ...         cache = new_cache()
    ...         ids = model.generate(ids, **cache_argument(model, cache))
    ...         save_cache(cache, path)
    ...         return ids
    >>> def resume(model, quantizers, ids, path):
    ...     with packed_cache(model, quantizers) as new_cache:
    ...         cache = load_cache(path, new_cache())
    ...         return model.generate(ids, **cache_argument(model, cache))
    """
    _check_savable(cache)
    n_columns = {layer.store.n_columns for layer in cache.packed}
    if len(n_columns) > 1 or any(layer.writing for layer in cache.packed):
        raise CacheStateError(
            "save_cache: expected a cache between two steps; got layers of "
            f"{', '.join(map(str, sorted(n_columns)))} tokens, left by a step that failed. Make a new cache."
        )
    # JSON header for counts and structure, arrays for all tensors: loading needs no pickle, and runs no code of a file.
    pool = TensorPool()
    header = {
        **_made_for(cache),
        "layers": [layer_record(layer.store, pool) for layer in cache.packed],
        "tables": tables_record(cache.tables, pool),
        "tool_version": tool_version(),
    }
    write(Path(path), Stored(format=FORMAT, version=VERSION, header=header, arrays=pool.arrays()))


@torch.no_grad()
def load_cache(path: str | Path, cache: PackedCache) -> PackedCache:
    """Fills an empty cache from a file, to continue where the saved one stopped.

    Parameters
    ----------
    path : str or Path
        File written by `save_cache`.
    cache : PackedCache
        New cache, of a context with the same model, quantizers and policy.

    Returns
    -------
    PackedCache
        The same cache, to be passed as `cache_argument(model, cache)` with all tokens so far and at least one more.

    Raises
    ------
    CorruptArtifactError
        If the file is missing, foreign, truncated or altered.
    UnsupportedVersionError
        If another format version wrote it.
    MismatchError
        If it was saved with another model, dtype, quantizers or policy.
    CacheStateError
        If the cache is not empty.
    """
    _check_savable(cache)
    if any(layer.store.sequences for layer in cache.packed):
        raise CacheStateError(
            f"load_cache: expected an empty cache; got one of {cache.get_seq_length()} tokens. Make a new one"
        )
    stored = read(Path(path), FORMAT, VERSION)
    _check(path, stored.header, _made_for(cache))
    try:
        _fill(cache, stored)
    except (ArtifactError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CorruptArtifactError(
            f"{path}: expected the records of a packed cache; got other content ({error}). Save the cache again"
        ) from error
    return cache


def _check_savable(cache: PackedCache) -> None:
    if cache.beside:
        raise UnsupportedModelError(
            "save_cache: expected a cache of keys and values alone; got one with running states, which the file does "
            "not hold. Read the text again instead."
        )


def _fill(cache: PackedCache, stored: Stored) -> None:
    # Everything is read before anything is assigned, so that a damaged file leaves the cache empty.
    readers = [CacheReader(stored.arrays, _device(layer.store.layer.module)) for layer in cache.packed]
    records = stored.header["layers"]
    sequences = [
        reader.sequences(layer.store, record)
        for reader, layer, record in zip(readers, cache.packed, records, strict=True)
    ]
    tables = readers[0].tables(stored.header["tables"])
    n_columns = [int(record["n_columns"]) for record in records]
    for layer, own, n in zip(cache.packed, sequences, n_columns, strict=True):
        layer.store.sequences, layer.store.n_columns = own, n
    cache.tables = tables


def _made_for(cache: PackedCache) -> dict[str, Any]:
    """Properties in which a saved cache and the one to load it into must agree."""
    stores = [layer.store for layer in cache.packed]
    modules = nn.ModuleList([store.layer.module for store in stores])
    quantizers = {site: quantizer for store in stores for site, quantizer in store.quantizers.items()}
    return {
        "model": model_fingerprint(modules[0], [store.layer for store in stores], None),
        "weights": weights_digest(modules),
        "dtype": str(next(modules.parameters()).dtype),
        "quantizers": quantizers_digest(quantizers),
        "policy": asdict(stores[0].policy),
    }


def _check(path: str | Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, wanted in own.items():
        if saved.get(name) != wanted:
            raise MismatchError(
                f"{path}: saved with other {name}; expected {wanted!r:.200}, got {saved.get(name)!r:.200}. Use the "
                "model, the quantizers and the policy that the cache was saved with."
            )


def _device(module: nn.Module) -> torch.device:
    """Device that a layer computes on; main memory if its weights are offloaded between steps."""
    weight: Tensor = next(module.parameters())
    return torch.device("cpu") if weight.is_meta else weight.device
