"""Packed cache behind the `Cache` interface of transformers (5.17 to 5.24); models read it by `replaced_attention`."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from artifacts.errors import MismatchError, UnsupportedModelError
from simquant.cache.errors import CacheStateError
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.cache.store.layer_store import LayerStore
from simquant.cache.store.rotary_tables import RotaryTables


@dataclass(frozen=True, eq=False)
class Arrival:
    """Data of a step that `Cache.update` is not given.

    Parameters
    ----------
    key : Tensor or None
        Keys before rotation; None if the rotated keys given to `update` are stored.
    real : Tensor or None
        Mask of the tokens that are not padding; None if all are real.
    """

    key: Tensor | None
    real: Bool[Tensor, "batch tokens"] | None


class PackedLayer(CacheLayerMixin):
    """Cache layer of transformers over a `LayerStore`."""

    supports_early_init = False
    is_croppable = True
    is_sliding = False  # masks cover all columns; the store itself drops tokens that a sliding window has passed

    def __init__(self, store: LayerStore) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store
        self.arrival: Arrival | None = None
        self.handed: tuple[Tensor, Tensor] | None = None  # keys and values returned to attention in the running step
        self.writing = False  # stays true after a step that failed while it wrote
        self._home: torch.device | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No-op: sequences are made by the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the tokens of a step, and returns them: attention reads the older ones from the store."""
        arrival, self.arrival = self.arrival, None
        self._check(arrival, key_states)
        assert arrival is not None
        self.prefetch()
        self._home, self.writing = key_states.device, True
        self.store.append(key_states if arrival.key is None else arrival.key, value_states, arrival.real)
        self.writing = False
        self.handed = key_states, value_states
        return self.handed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of masks: all columns, from the first."""
        return self.store.n_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Number of columns, padding included."""
        return self.store.n_columns

    def get_max_length(self) -> int:
        """Maximum length: -1, no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Maximum length under its name in transformers 5.17."""
        return -1

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes that many columns if negative; keeps that many if positive, as transformers 5.17 calls it."""
        n_columns = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        self.store.crop(n_columns if n_columns > 0 else self.store.n_columns + n_columns)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence that many times."""
        self.batch_select_indices(torch.arange(len(self.store.sequences)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences, in this order."""
        self.store.select(torch.arange(len(self.store.sequences))[indices.cpu()].tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences, for beam search."""
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Empties the layer."""
        self.store.clear()
        self.arrival, self.handed, self.writing = None, None, False

    def offload(self) -> None:
        """Moves the stored tensors to main memory, until the next update."""
        self.store.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Moves the stored tensors back to the device of the tokens."""
        if self._home is not None and self._home.type != "cpu":
            self.store.to(self._home)

    def copy(self, sources: DecodedSources) -> "PackedLayer":
        """Layer of another cache that shares the tensors stored so far."""
        other = copy.copy(self)
        other.store = self.store.copy(sources)
        other.arrival = other.handed = None
        return other

    def _check(self, arrival: Arrival | None, key: Tensor) -> None:
        who, layer = f"layers.{self.store.layer.layer}", self.store.layer
        if (key.shape[1], key.shape[3]) != (layer.kv_heads, layer.head_dim):
            raise MismatchError(
                f"{who}: expected keys of {layer.kv_heads} heads of {layer.head_dim} channels, as the cache was made "
                f"for; got {key.shape[1]} of {key.shape[3]}. Use a cache that was made for this model."
            )
        if arrival is None:
            raise MismatchError(
                f"{who}: the cache was updated by a model that is not inside the `packed_cache` context of the cache. "
                "Call the model of that context, inside it."
            )
        if self.writing:
            raise CacheStateError(
                f"{who}: an earlier step failed while this layer was written, so that its tokens are incomplete. Make "
                "a new cache."
            )


def own_layers(model: nn.Module, layers: Sequence[int]) -> list[Any]:
    """Empty layers of a model's own cache, if it has others beside `layers`, those with keys and values.

    Raises
    ------
    UnsupportedModelError
        If one of `layers` caches more than keys and values, or the model takes caches of a class of its own alone.
    """
    standard = getattr(model, "_supports_default_dynamic_cache", None)
    if standard is not None and not standard():
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected a model that takes any cache of transformers; this one takes a class of "
            "its own alone. Use the protocol 'full'."
        )
    own: list[Any] = DynamicCache(config=getattr(model, "config", None)).layers
    for index in layers:
        if index < len(own) and type(own[index]) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(
                f"layers.{index}: expected a cache of keys and values alone; got {type(own[index]).__name__}, which "
                "holds more than a packed cache keeps. Use the protocol 'full'."
            )
    return own if len(own) > len(layers) else []


class PackedCache(Cache):
    """KV cache of a transformers model that stores codes.

    Parameters
    ----------
    stores : sequence of LayerStore
        One for each layer, in order.
    session : object
        Context that made the cache; a model uses caches of its own context only.
    beside : sequence of cache layers
        Empty layers of the model's own cache, from `own_layers`, for a hybrid whose other layers keep running
        states; empty for any other model.
    """

    def __init__(self, stores: Sequence[LayerStore], session: object, beside: Sequence[Any] = ()) -> None:
        packed = {store.layer.layer: PackedLayer(store) for store in stores}
        super().__init__(layers=[packed.get(index, layer) for index, layer in enumerate(beside or stores)])
        self.layers: list[Any]  # packed layers, and of a hybrid those of its own cache
        self.session = session
        self.tables = RotaryTables()

    @property
    def packed(self) -> list[PackedLayer]:
        """Layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def beside(self) -> list[Any]:
        """Layers that hold a running state in full precision, or nothing."""
        return [layer for layer in self.layers if not isinstance(layer, PackedLayer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedCache":
        """Copy that grows independently. The two share the model, the quantizers, and the tensors stored so far."""
        other = copy.copy(self)
        memo[id(self)] = other
        sources = self.packed[0].store.sources.empty()
        other.layers = [
            layer.copy(sources) if isinstance(layer, PackedLayer) else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        other.tables = self.tables.copy()
        return other

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Stores a step's keys and values of one layer.

        Raises
        ------
        MismatchError
            If another model is running.
        CacheStateError
            If an earlier step stopped between two layers.
        """
        if not 0 <= layer_idx < len(self.layers) or not isinstance(self.layers[layer_idx], PackedLayer):
            raise MismatchError(
                f"layers.{layer_idx}: expected one of the layers that the cache was made for, "
                f"{[layer.store.layer.layer for layer in self.packed]}. Use a cache that was made for this model."
            )
        # Layers update in order: those before `layer_idx` already hold this step's tokens, the others do not.
        held = [layer.store.n_columns for layer in self.packed]
        n_done = sum(layer.store.layer.layer < layer_idx for layer in self.packed)
        done = held[0] if n_done else held[0] + key_states.shape[2]
        if held != [done] * n_done + [done - key_states.shape[2]] * (len(held) - n_done):
            raise CacheStateError(
                f"layers.{layer_idx}: expected all layers to hold as many tokens before a step; got {min(held)} to "
                f"{max(held)}, left by an earlier step that failed between two layers. Make a new cache."
            )
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: codes, scales, full-precision tokens and states, rotary tables; shared ones count once."""
        # Beams share tensors until they grow apart; the address of its memory identifies a tensor.
        held = {tensor.data_ptr(): tensor.nbytes for tensor in self.tensors()}
        return sum(held.values())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the cache."""
        yield from self.tables.tensors()
        for layer in self.packed:
            yield from layer.store.tensors()
        for layer in self.beside:
            states = (getattr(layer, name, {}) for name in ("conv_states", "recurrent_states"))
            yield from (state for held in states for state in held.values() if state is not None)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes that many tokens if negative, keeps that many if positive; changes nothing if any layer raises."""
        if self.beside:
            raise CacheStateError(
                "crop: expected a cache of keys and values alone; got one with running states, which cannot be taken "
                "back. Make a new cache and read the text again."
            )
        # A layer may refuse to crop (tokens evicted, a group cut) after others have: restore those, so that the cache
        # stays consistent. Stores replace their sequences and never change them, so that references are enough.
        stores = [layer.store for layer in self.packed]
        before = [(store.sequences, store.n_columns) for store in stores]
        try:
            super().crop(int(tokens_to_remove))
        except CacheStateError:
            for store, held in zip(stores, before, strict=True):
                store.sequences, store.n_columns = held
            raise
        self.tables.crop(self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences of the batch, in this order."""
        for layer in self.layers:
            layer.reorder_cache(indices)
        self.tables.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence that many times."""
        self.batch_select_indices(torch.arange(len(self.packed[0].store.sequences)).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences, for beam search."""
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()  # type: ignore[no-untyped-call]
        self.tables = RotaryTables()
