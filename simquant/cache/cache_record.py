"""All that a packed cache holds as JSON values and a pool of tensors, and back."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from artifacts.codes import Codes
from artifacts.storage import Array
from artifacts.streaming import StreamingState
from simquant.cache.layer_store import LayerStore
from simquant.cache.rotary_tables import RotaryTables
from simquant.cache.small_norms import SmallNorms
from simquant.cache.stream import Stream
from simquant.cache.tensor_pool import TensorPool, take
from simquant.cache.token_store import TokenStore
from simquant.eviction.survivors import Survivors

Record = dict[str, Any]
State = TypeVar("State", Survivors, SmallNorms, StreamingState)

_COUNTS = ("n_tokens", "n_evicted", "encoded_end", "_forgotten_blocks")
_HELD = ("_sinks", "_recent", "_recent_kept")


def layer_record(store: LayerStore, pool: TensorPool) -> Record:
    """What one layer holds."""
    return {"n_columns": store.n_columns, "streams": [_stream_record(stream, pool) for stream in store.streams]}


def tables_record(tables: RotaryTables, pool: TensorPool) -> Record:
    """The rotary tables; where both halves of a head rotate alike, one of them."""
    halves = [table[..., : table.shape[-1] // 2] for table in tables.tensors()]
    twice = [
        torch.equal(torch.cat([half, half], dim=-1), table)
        for half, table in zip(halves, tables.tensors(), strict=True)
    ]
    kept = [half if same else table for half, table, same in zip(halves, tables.tensors(), twice, strict=True)]
    return {
        "of_layer": [[layer, index] for layer, index in tables._of_layer.items()],
        "tables": [pool.add(table) for table in kept],
        "twice": twice,
    }


@dataclass(frozen=True)
class CacheReader:
    """Rebuilds what the records of a file say.

    Parameters
    ----------
    arrays : Mapping[str, array]
        The pool's.
    device : torch.device
        Where what is read shall be.
    """

    arrays: Mapping[str, Array]
    device: torch.device

    def streams(self, store: LayerStore, record: Record) -> list[Stream]:
        """The streams of a layer, for an empty store of it."""
        return [self._stream(store._new_stream(self.device), stream) for stream in record["streams"]]

    def tables(self, record: Record) -> RotaryTables:
        """The rotary tables."""
        found = RotaryTables()
        for place, twice in zip(record["tables"], record["twice"], strict=True):
            table = self._take(place)
            found._tables.append(torch.cat([table, table], dim=-1) if twice else table)
            found._seen.append(weakref.ref(torch.empty(0)))  # gone at once: the next step brings tables of its own
        found._of_layer = {int(layer): int(index) for layer, index in record["of_layer"]}
        return found

    def _stream(self, empty: Stream, record: Record) -> Stream:
        for store, stored in zip(empty.stores(), (record["key"], record["value"]), strict=True):
            self._fill(store, stored)
        survivors, small = self._state(Survivors, record["survivors"]), self._state(SmallNorms, record["small"])
        if (survivors is None, small is None) != (empty.survivors is None, empty.small is None):
            raise ValueError("survivors and small norms are kept where the policy asks for them")
        return replace(empty, n_padding=int(record["n_padding"]), survivors=survivors, small=small)

    def _fill(self, store: TokenStore, record: Record) -> None:
        for name in _COUNTS:
            setattr(store, name, int(record[name]))
        for name in _HELD:
            setattr(store, name, None if record[name] is None else self._take(record[name]))
        store.blocks = [self._codes(block) for block in record["blocks"]]
        store._state = self._state(StreamingState, record["running"])

    def _codes(self, record: Record) -> Codes:
        n_tokens, channels = record["shape"]
        return Codes(
            tensors={name: self._take(place) for name, place in record["tensors"]},
            shape=(int(n_tokens), int(channels)),
            dtype=_DTYPES[record["dtype"]],
            inner=None if record["inner"] is None else self._codes(record["inner"]),
        )

    def _state(self, kind: Callable[..., State], record: Record | None) -> State | None:
        if record is None:
            return None
        return kind(**{name: self._take(x) if isinstance(x, list) else int(x) for name, x in record.items()})

    def _take(self, place: list[Any]) -> Tensor:
        return take(self.arrays, place, self.device)


_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def _stream_record(stream: Stream, pool: TensorPool) -> Record:
    return {
        "n_padding": stream.n_padding,
        "survivors": _state_record(stream.survivors, pool),
        "small": _state_record(stream.small, pool),
        "key": _store_record(stream.key, pool),
        "value": _store_record(stream.value, pool),
    }


def _store_record(store: TokenStore, pool: TensorPool) -> Record:
    held = {name: getattr(store, name) for name in _HELD}
    return {
        **{name: getattr(store, name) for name in _COUNTS},
        **{name: None if tensor is None else pool.add(tensor) for name, tensor in held.items()},
        "blocks": [_codes_record(codes, pool) for codes in store.blocks],
        "running": _state_record(store._state, pool),
    }


def _codes_record(codes: Codes, pool: TensorPool) -> Record:
    return {
        "shape": list(codes.shape),
        "dtype": str(codes.dtype),
        "tensors": [[name, pool.add(tensor)] for name, tensor in codes.tensors.items()],
        "inner": None if codes.inner is None else _codes_record(codes.inner, pool),
    }


def _state_record(state: Survivors | SmallNorms | StreamingState | None, pool: TensorPool) -> Record | None:
    if state is None:
        return None
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: pool.add(x) if isinstance(x, Tensor) else x for name, x in values.items()}
