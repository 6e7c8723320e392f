"""Conversion of a packed cache to JSON values and a pool of tensors, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.span import Span
from artifacts.errors import InvalidValueError
from artifacts.quantizers.streaming import StreamingState
from artifacts.storage import Array
from simquant.cache.saving.tensor_pool import TensorPool, take
from simquant.cache.store.cached_sequence import CachedSequence, Survivors
from simquant.cache.store.layer_store import LayerStore
from simquant.cache.store.rotary_tables import RotaryTables
from simquant.cache.store.small_norms import SmallNorms
from simquant.cache.store.token_state import TokenState

Record = dict[str, Any]
State = TypeVar("State", Survivors, SmallNorms, StreamingState)


def layer_record(store: LayerStore, pool: TensorPool) -> Record:
    """Record of one layer."""
    return {"n_columns": store.n_columns, "streams": [_sequence_record(sequence, pool) for sequence in store.sequences]}


def tables_record(tables: RotaryTables, pool: TensorPool) -> Record:
    """Record of the rotary tables; of tables whose two halves are equal, the first half."""
    # The rotate-half convention of most models repeats the same angles in both halves of a head: half is enough.
    whole = list(tables.tensors())
    halves = [table[..., : table.shape[-1] // 2] for table in whole]
    twice = [torch.equal(torch.cat([half, half], dim=-1), table) for half, table in zip(halves, whole, strict=True)]
    return {
        "of_layer": [[layer, index] for layer, index in tables.of_layer.items()],
        "tables": [pool.add(half if same else table) for half, table, same in zip(halves, whole, twice, strict=True)],
        "twice": twice,
    }


def codes_record(codes: Codes, pool: TensorPool) -> Record:
    """Record of codes, inner codes included."""
    return {
        "shape": list(codes.shape),
        "dtype": str(codes.dtype),
        "tensors": [[name, pool.add(tensor)] for name, tensor in codes.tensors.items()],
        "spans": {name: [span.tokens, span.entries] for name, span in codes.spans.items()},
        "inner": None if codes.inner is None else codes_record(codes.inner, pool),
    }


@dataclass(frozen=True)
class CacheReader:
    """Rebuilds the parts of a cache from the records of a file.

    Parameters
    ----------
    arrays : Mapping[str, array]
        Arrays of the tensor pool.
    device : torch.device
        Device of the rebuilt tensors.
    """

    arrays: Mapping[str, Array]
    device: torch.device

    def sequences(self, store: LayerStore, record: Record) -> list[CachedSequence]:
        """Sequences of a layer, for its empty store."""
        return [self._sequence(store.empty_sequence(self.device), sequence) for sequence in record["streams"]]

    def tables(self, record: Record) -> RotaryTables:
        """Rotary tables."""
        kept = zip(map(self._take, record["tables"]), record["twice"], strict=True)
        return RotaryTables(
            tables=[torch.cat([table, table], dim=-1) if twice else table for table, twice in kept],
            of_layer={int(layer): int(index) for layer, index in record["of_layer"]},
        )

    def codes(self, record: Record) -> Codes:
        """Codes of a record, checked for consistent counts."""
        n_tokens, channels = record["shape"]
        codes = Codes(
            tensors={name: self._take(place) for name, place in record["tensors"]},
            shape=(int(n_tokens), int(channels)),
            dtype=_DTYPES[record["dtype"]],
            spans={name: Span(*span) for name, span in record["spans"].items()},
            inner=None if record["inner"] is None else self.codes(record["inner"]),
        )
        codes.check()
        return codes

    def _sequence(self, empty: CachedSequence, record: Record) -> CachedSequence:
        for store, stored in zip(empty.stores(), (record["key"], record["value"]), strict=True):
            store.restore(self._tokens(store.state(), stored))
        survivors, small = self._state(Survivors, record["survivors"]), self._state(SmallNorms, record["small"])
        if (survivors is None, small is None) != (empty.survivors is None, empty.small is None):
            raise InvalidValueError(
                "survivors and small norms: expected both as the policy asks for them; got survivors "
                f"{'missing' if survivors is None else 'given'}, small norms {'missing' if small is None else 'given'}"
            )
        return replace(empty, n_padding=int(record["n_padding"]), survivors=survivors, small=small)

    def _tokens(self, empty: TokenState, record: Record) -> TokenState:
        return TokenState(
            counts={name: int(record[name]) for name in empty.counts},
            exact={name: None if record[name] is None else self._take(record[name]) for name in empty.exact},
            blocks=[self.codes(block) for block in record["blocks"]],
            running=self._state(StreamingState, record["running"]),
        )

    def _state(self, kind: Callable[..., State], record: Record | None) -> State | None:
        if record is None:
            return None
        return kind(**{name: self._take(x) if isinstance(x, list) else int(x) for name, x in record.items()})

    def _take(self, place: list[Any]) -> Tensor:
        return take(self.arrays, place, self.device)


_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
"""Dtypes of encoded tokens: those that models compute in."""


def _sequence_record(sequence: CachedSequence, pool: TensorPool) -> Record:
    return {
        "n_padding": sequence.n_padding,
        "survivors": _state_record(sequence.survivors, pool),
        "small": _state_record(sequence.small, pool),
        "key": _tokens_record(sequence.key.state(), pool),
        "value": _tokens_record(sequence.value.state(), pool),
    }


def _tokens_record(held: TokenState, pool: TensorPool) -> Record:
    return {
        **held.counts,
        **{name: None if tensor is None else pool.add(tensor) for name, tensor in held.exact.items()},
        "blocks": [codes_record(codes, pool) for codes in held.blocks],
        "running": _state_record(held.running, pool),
    }


def _state_record(state: Survivors | SmallNorms | StreamingState | None, pool: TensorPool) -> Record | None:
    if state is None:
        return None
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: pool.add(x) if isinstance(x, Tensor) else x for name, x in values.items()}
