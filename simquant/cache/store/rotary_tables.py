"""RoPE cosines and sines of every column of a cache, stored once for all layers."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from artifacts.model.attention import AttentionLayer
from artifacts.model.rope import rotate


class RotaryTables:
    """Cosines and sines by which pre-RoPE keys are rotated when they are read: the model's own tables, by column.

    Layers that are given the same tensors share one table; models with several rotary embeddings (local and global
    layers of Gemma 3) have as many. Sequences of a batch share a row while their positions are equal.

    Parameters
    ----------
    tables : sequence of Float[Tensor, "2 batch tokens rotary_dim"]
        Cosines and sines so far; each step adds columns.
    of_layer : Mapping[int, int] or None
        Index of the table of each layer.
    """

    def __init__(self, tables: Sequence[Tensor] = (), of_layer: Mapping[int, int] | None = None) -> None:
        self._tables, self.of_layer = list(tables), dict(of_layer or {})
        self._seen = [weakref.ref(torch.empty(0)) for _ in tables]  # dead references: no step has been seen

    def note(self, layer: AttentionLayer, position_embeddings: tuple[Tensor, Tensor], n_columns: int) -> None:
        """Adds the tables of a step, unless a layer with the same ones has; the cache holds `n_columns` before it."""
        # transformers computes cos and sin once per step and passes the same tensor to each layer: identity of the
        # tensor, by weak reference, tells "same step, same embedding". Tables that a failed step left are cut off at
        # n_columns. Recomputing them instead would need every rope_scaling rule of every model.
        seen = [ref() is position_embeddings[0] for ref in self._seen]
        index = self.of_layer.get(layer.layer)
        if index is None:
            index = self.of_layer[layer.layer] = seen.index(True) if True in seen else len(seen)
        if index < len(seen) and seen[index]:
            return
        new = _same_rows_once(torch.stack(layer.tables(position_embeddings)))  # [2, rows, tokens, rotary_dim]
        if index == len(seen):
            self._tables.append(new)
            self._seen.append(weakref.ref(position_embeddings[0]))
            return
        held = self._tables[index][:, :, :n_columns]
        # One shared row becomes a row per sequence with the first step whose positions differ between sequences.
        rows = max(held.shape[1], new.shape[1])
        self._tables[index] = torch.cat([x.expand(-1, rows, -1, -1) for x in (held, new)], dim=2)
        self._seen[index] = weakref.ref(position_embeddings[0])

    def rotated(
        self,
        layer: AttentionLayer,
        key: Float[Tensor, "kv_heads tokens head_dim"],
        row: int,
        columns: slice | Int64[Tensor, " tokens"],
    ) -> Float[Tensor, "kv_heads tokens head_dim"]:
        """Keys of some columns of one sequence of the batch, rotated."""
        cos, sin = self.of_tokens(layer, row, columns).unsqueeze(1)
        return rotate(key.unsqueeze(0), cos, sin, layer.rotation)[0]

    def of_tokens(
        self, layer: AttentionLayer, row: int, columns: slice | Int64[Tensor, " tokens"]
    ) -> Float[Tensor, "2 tokens rotary_dim"]:
        """Cosines and sines of some columns of a sequence of the batch."""
        tables = self._tables[self.of_layer[layer.layer]]
        return tables[:, min(row, tables.shape[1] - 1), columns]

    def copy(self) -> "RotaryTables":
        """Tables of another cache that shares the tensors so far."""
        return RotaryTables(self._tables, self.of_layer)

    def crop(self, n_tokens: int) -> None:
        """Keeps the first columns only."""
        self._change(lambda table: table[:, :, :n_tokens].clone())

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences of the batch, in this order."""
        self._change(lambda table: table if table.shape[1] == 1 else table[:, rows.to(table.device)])

    def tensors(self) -> Iterator[Tensor]:
        """All tables."""
        yield from self._tables

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._tables = [change(table) for table in self._tables]


def _same_rows_once(tables: Float[Tensor, "2 batch tokens rotary_dim"]) -> Float[Tensor, "2 rows tokens rotary_dim"]:
    # Rows differ where padding shifts position ids; otherwise one row serves the whole batch.
    return tables[:, :1].clone() if (tables == tables[:, :1]).all() else tables
