"""The packed cache as transformers sees it (5.17 to 5.24); `replaced_attention` is how a model comes to read it."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from artifacts.errors import MismatchError
from simquant.cache.errors import CacheStateError
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.cache.store.layer_store import LayerStore
from simquant.cache.store.rotary_tables import RotaryTables


@dataclass(frozen=True, eq=False)
class Arrival:
    """What a layer has to know of a step besides what `update` gets.

    Parameters
    ----------
    key : Tensor or None
        The keys before rotation; None where the keys that `update` gets are stored.
    real : Tensor or None
        Which tokens are no padding; None if all are.
    """

    key: Tensor | None
    real: Bool[Tensor, "batch tokens"] | None


class PackedLayer(CacheLayerMixin):
    """A `LayerStore` as transformers sees it."""

    supports_early_init = False
    is_croppable = True
    is_sliding = False  # masks cover all columns; the store itself drops what a window has passed

    def __init__(self, store: LayerStore) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store
        self.arrival: Arrival | None = None
        self.handed: tuple[Tensor, Tensor] | None = None  # what attention is to read of the step, while it runs
        self.writing = False  # true also after a step that stopped in the middle of it
        self._home: torch.device | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: sequences are made when the first tokens come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the tokens of a step, and hands them back: attention reads the rest from the store."""
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
        """All columns, from the first."""
        return self.store.n_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.store.n_columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit, under the name of transformers 5.17."""
        return -1

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes that many columns if negative; keeps that many if positive, as transformers 5.17 asks."""
        n_columns = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        self.store.crop(n_columns if n_columns > 0 else self.store.n_columns + n_columns)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence that many times."""
        self.batch_select_indices(torch.arange(len(self.store.sequences)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These sequences, in this order."""
        self.store.select(torch.arange(len(self.store.sequences))[indices.cpu()].tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """These sequences, in this order, for beam search."""
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Empties the layer."""
        self.store.clear()
        self.arrival, self.handed, self.writing = None, None, False

    def offload(self) -> None:
        """Moves what is stored to main memory, until the next update."""
        self.store.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Moves what is stored back to the device that the tokens came from."""
        if self._home is not None and self._home.type != "cpu":
            self.store.to(self._home)

    def copy(self, sources: DecodedSources) -> "PackedLayer":
        """A layer of another cache, which shares what is stored so far."""
        other = copy.copy(self)
        other.store = self.store.copy(sources)
        other.arrival = other.handed = None
        return other

    def _check(self, arrival: Arrival | None, key: Tensor) -> None:
        who, layer = f"layers.{self.store.layer.layer}", self.store.layer
        if (key.shape[1], key.shape[3]) != (layer.kv_heads, layer.head_dim):
            raise MismatchError(
                f"{who}: the cache was made for {layer.kv_heads} heads of {layer.head_dim} channels; got "
                f"{key.shape[1]} of {key.shape[3]}. Use a cache that was made for this model."
            )
        if arrival is None:
            raise MismatchError(
                f"{who}: the cache was updated by a model that is not inside the `packed_cache` context that made it. "
                "Call the model it was made for, inside the context."
            )
        if self.writing:
            raise CacheStateError(
                f"{who}: an earlier step stopped while this layer was written; the cache cannot be used. Make a new "
                "one."
            )


class PackedCache(Cache):
    """A cache of a transformers model whose history is packed.

    Parameters
    ----------
    stores : sequence of LayerStore
        One for each layer, in order.
    session : object
        The context that made it; a model may use caches of its own context only.
    """

    def __init__(self, stores: Sequence[LayerStore], session: object) -> None:
        super().__init__(layers=[PackedLayer(store) for store in stores])
        self.layers: list[PackedLayer]  # type: ignore[assignment]  # no other kind is ever put in
        self.session = session
        self.tables = RotaryTables()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedCache":
        """A cache that goes on by itself. The two share the model, the quantizers, and what is stored so far."""
        other = copy.copy(self)
        memo[id(self)] = other
        sources = self.layers[0].store.sources.empty()
        other.layers = [layer.copy(sources) for layer in self.layers]
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
        if not 0 <= layer_idx < len(self.layers):
            raise MismatchError(
                f"layers.{layer_idx}: the cache was made for a model of {len(self.layers)} layers. Use a cache that "
                "was made for this one."
            )
        held = [layer.store.n_columns for layer in self.layers]
        done = held[0] if layer_idx else held[0] + key_states.shape[2]
        if held != [done] * layer_idx + [done - key_states.shape[2]] * (len(held) - layer_idx):
            raise CacheStateError(
                f"layers.{layer_idx}: an earlier step stopped between two layers, which hold {min(held)} and "
                f"{max(held)} tokens; the cache cannot be used. Make a new one."
            )
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held: codes, scales, exact tokens and rotary tables; what beams share counts once."""
        held = {tensor.data_ptr(): tensor.nbytes for tensor in self.tensors()}
        return sum(held.values())

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is held."""
        yield from self.tables.tensors()
        for layer in self.layers:
            yield from layer.store.tensors()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes that many tokens if negative, keeps that many if positive; where a layer refuses, in no layer."""
        stores = [layer.store for layer in self.layers]
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
        super().batch_select_indices(indices)
        self.tables.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence that many times."""
        self.batch_select_indices(torch.arange(len(self.layers[0].store.sequences)).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """These sequences, in this order, for beam search."""
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()  # type: ignore[no-untyped-call]
        self.tables = RotaryTables()
