"""Keys and values of one layer of a packed cache, for each sequence of the batch."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from artifacts.errors import MismatchError
from artifacts.model.attention import AttentionLayer
from artifacts.model.layout import to_rows
from artifacts.quantizer import Quantizer
from artifacts.quantizers.running import first_state
from artifacts.sites import Site
from simquant.cache.attention.block_attention import BlockAttention, Scoring
from simquant.cache.errors import CacheStateError
from simquant.cache.store.cached_sequence import CachedSequence, Survivors
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.cache.store.packed_reading import add_packed, all_seen, can_read
from simquant.cache.store.rotary_tables import RotaryTables
from simquant.cache.store.small_norms import SmallNorms
from simquant.cache.store.token_store import TokenStore
from simquant.policy.checks import group_tokens
from simquant.policy.policy import CachePolicy

BLOCK_TOKENS = 1024
"""Tokens decoded at a time, rounded up to whole groups: few enough that a block stays in the CPU cache."""


class LayerStore:
    """Cached sequences of one layer; all have the same number of columns, padding included.

    Parameters
    ----------
    layer : AttentionLayer
        Layer that the keys and values come from.
    quantizers : mapping from Site to Quantizer
        Quantizers of the layer's keys and values, among others.
    policy : CachePolicy
        Tokens kept in full precision, and eviction.
    sources : DecodedSources
        Decoded sources of predicted sites, shared by the layers of a cache.
    """

    def __init__(
        self,
        layer: AttentionLayer,
        quantizers: Mapping[Site, Quantizer],
        policy: CachePolicy,
        sources: DecodedSources,
    ) -> None:
        self.layer, self.policy, self.sources = layer, policy, sources
        [self.key_site] = (site for site in quantizers if (site.layer, site.tensor) == (layer.layer, "key"))
        self.value_site = Site(layer.layer, "value")
        self.quantizers = {site: quantizers[site] for site in (self.key_site, self.value_site)}
        self.n_columns = 0
        self.sequences: list[CachedSequence] = []

    @property
    def rotates(self) -> bool:
        """True if keys are stored before RoPE and rotated when they are read."""
        return self.key_site.stage == "pre_rope" and self.layer.rotation != "none"

    def empty_sequence(self, device: torch.device) -> CachedSequence:
        """Sequence without tokens, on a device."""
        group = group_tokens(self.quantizers)
        runs = any(first_state(quantizer) is not None for quantizer in self.quantizers.values())
        # Running scales code a chunk of tokens as one run that cannot be cut: eviction drops whole blocks of it, so
        # that a block is then one group of tokens.
        block = group if runs and self._evicts else -(-BLOCK_TOKENS // group) * group
        key, value = (
            TokenStore(quantizer.to(device), self.policy, self.policy.window(site.tensor), block)
            for site, quantizer in self.quantizers.items()
        )
        n_smallest = self.policy.keep_smallest_norm
        small = SmallNorms.none(n_smallest, self.policy.sink_tokens, device) if n_smallest else None
        return CachedSequence(key, value, survivors=Survivors.none(device) if self._evicts else None, small=small)

    def append(
        self,
        key: Float[Tensor, "batch kv_heads tokens head_dim"],
        value: Float[Tensor, "batch kv_heads tokens head_dim"],
        real: Bool[Tensor, "batch tokens"] | None,
    ) -> None:
        """Appends the columns of a step; `real` masks those that are not padding, None if all are real."""
        batch, _, tokens, _ = key.shape
        self.sequences = self.sequences or [self.empty_sequence(key.device) for _ in range(batch)]
        if len(self.sequences) != batch:
            raise MismatchError(
                f"layers.{self.layer.layer}: expected a batch of {len(self.sequences)} sequences, as the cache holds; "
                f"got {batch}. Use a new cache for another text."
            )
        self._forget()
        # "batch kv_heads tokens head_dim" to "batch tokens channels": a token's codes cover all heads.
        rows = {site: to_rows(x).view(batch, tokens, -1) for site, x in zip(self.quantizers, (key, value), strict=True)}
        for index, sequence in enumerate(self.sequences):
            n_padding = 0 if real is None else self._padding(sequence, real[index])
            own = {site: x[index, n_padding:] for site, x in rows.items()}
            grown = sequence.appended(own, self.sources, index)
            self.sequences[index] = replace(grown, n_padding=sequence.n_padding + n_padding)
        self.n_columns += tokens

    def attend(
        self,
        query: Float[Tensor, "batch q_heads queries head_dim"],
        visible: Bool[Tensor, "#batch queries columns"],
        scoring: Scoring,
        tables: RotaryTables,
    ) -> Float[Tensor, "batch queries q_heads head_dim"]:
        """Attention of the last step's queries over all columns, decoding one block at a time.

        Where kernels can read the codes of a single query's step, they do; the rest is decoded.
        """
        rows = []
        for row, sequence in enumerate(self.sequences):
            attention = BlockAttention(query[row], self.layer.kv_heads, scoring)
            seen = visible[min(row, len(visible) - 1)]
            spans = sequence.spans()
            if can_read(self.layer, sequence, query, scoring, rotates=self.rotates) and all_seen(sequence, seen):
                rotary = tables.of_tokens(self.layer, row, slice(None)) if self.rotates else None
                spans = add_packed(attention, query[row, :, 0], sequence, scoring.scaling, rotary)
            for start, end in spans:
                tokens = slice(start, end)
                key = partial(self.key, sequence, row, tokens, tables)
                attention.add(key, partial(self.value, sequence, tokens), seen[:, sequence.columns(tokens)])
            rows.append(attention.result())
        return torch.stack(rows)

    def end_step(self) -> None:
        """Frees the decoded tokens of this layer, and those of sources that no later layer needs."""
        for _, store in self.stores():
            store.forget_decoded()
        self.sources.release(self.value_site)

    def key(
        self, sequence: CachedSequence, row: int, tokens: slice, tables: RotaryTables
    ) -> Float[Tensor, "kv_heads tokens head_dim"]:
        """Decoded keys of some tokens of a sequence, rotated."""
        key = self._heads(sequence.key.read(tokens.start, tokens.stop))
        # Pre-RoPE keys are quantized without rotation, as their channels then have stable ranges (KVQuant, 2401.18079,
        # section 3.2), and rotated after decoding with the cosines and sines of the columns they were appended at.
        return tables.rotated(self.layer, key, row, sequence.columns(tokens)) if self.rotates else key

    def value(self, sequence: CachedSequence, tokens: slice) -> Float[Tensor, "kv_heads tokens head_dim"]:
        """Decoded values of some tokens of a sequence."""
        return self._heads(sequence.value.read(tokens.start, tokens.stop))

    def key_blocks(
        self, row: int, visible: Bool[Tensor, "queries columns"], tables: RotaryTables
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Decoded keys of a sequence block by block, with the mask of the visible ones."""
        sequence = self.sequences[row]
        for start, end in sequence.spans():
            tokens = slice(start, end)
            yield self.key(sequence, row, tokens, tables), visible[:, sequence.columns(tokens)]

    def crop(self, n_columns: int) -> None:
        """Keeps the first columns only.

        Raises
        ------
        CacheStateError
            If that would split a group of tokens, or needs tokens that a sliding window has dropped; the store is
            unchanged then.
        """
        self.sequences = [self._cropped(sequence, n_columns) for sequence in self.sequences]
        self.n_columns = min(self.n_columns, n_columns)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these sequences of the batch, in this order; repeated ones share the tensors stored so far."""
        self.sequences = [
            replace(self.sequences[row], key=self.sequences[row].key.copy(), value=self.sequences[row].value.copy())
            for row in rows
        ]

    def copy(self, sources: DecodedSources) -> "LayerStore":
        """Layer of another cache that shares the tensors stored so far."""
        other = copy.copy(self)
        other.sources = sources
        other.select(range(len(self.sequences)))
        return other

    def to(self, device: torch.device) -> None:
        """Moves all sequences to another device."""
        self.sequences = [sequence.to(device) for sequence in self.sequences]

    def clear(self) -> None:
        """Removes all sequences."""
        self.sequences, self.n_columns = [], 0

    def stores(self) -> Iterator[tuple[Site, TokenStore]]:
        """Stores of the keys and values of every sequence, with their sites."""
        for sequence in self.sequences:
            yield self.key_site, sequence.key
            yield self.value_site, sequence.value

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the layer."""
        for sequence in self.sequences:
            yield from sequence.key.tensors()
            yield from sequence.value.tensors()
            if sequence.survivors is not None:
                yield sequence.survivors.numbers
            if sequence.small is not None:
                yield from (sequence.small.numbers, sequence.small.norms)

    @property
    def _evicts(self) -> bool:
        return self.policy.eviction is not None and self.layer.sliding_window is None

    def _padding(self, sequence: CachedSequence, real: Bool[Tensor, " tokens"]) -> int:
        """Number of new columns before the sequence's first token."""
        # Padding is not stored: columns of the batch are mapped to tokens of a sequence by one offset, which needs all
        # padding before the first token.
        n_padding = len(real) - int(real.sum())
        if n_padding and (sequence.key.n_tokens or not real[n_padding:].all()):
            raise MismatchError(
                f"layers.{self.layer.layer}: expected padding on the left only; got an attention mask that hides "
                f"{n_padding} tokens after the first one of their sequence. Set tokenizer.padding_side = 'left'."
            )
        return n_padding

    def _heads(self, rows: Float[Tensor, "tokens channels"]) -> Float[Tensor, "kv_heads tokens head_dim"]:
        return rows.view(len(rows), self.layer.kv_heads, self.layer.head_dim).transpose(0, 1)

    def _forget(self) -> None:
        """Drops blocks that a sliding window has passed by more than a block, so that a block can still be cropped."""
        # Memory of a sliding-window layer is bounded. The extra block leaves room to crop as many tokens, as assisted
        # generation does after rejected candidates.
        if self.layer.sliding_window is None or self.sources:  # other layers may be predicted from the tokens
            return
        for _, store in self.stores():
            store.forget_before(store.n_tokens - self.layer.sliding_window - store.block_tokens)

    def _cropped(self, sequence: CachedSequence, n_columns: int) -> CachedSequence:
        n_tokens = max(0, n_columns - sequence.n_padding)
        survivors, small = sequence.survivors, None if sequence.small is None else sequence.small.cropped(n_tokens)
        if survivors is not None:
            survivors = survivors.cropped(n_tokens, f"layers.{self.layer.layer}")
            n_tokens = len(survivors.numbers)
        # The next query sees at most the last sliding_window tokens.
        for store in sequence.stores():
            needed = max(0, n_tokens - (self.layer.sliding_window or n_tokens))
            if n_tokens and store.first_token > needed:
                raise CacheStateError(
                    f"layers.{self.layer.layer}: cannot crop to {n_tokens} tokens: that needs token {needed}, and the "
                    f"sliding window has dropped all tokens before {store.first_token}. Crop at most "
                    f"{store.block_tokens} tokens."
                )
        key, value = (store.cropped(n_tokens) for store in sequence.stores())
        n_padding = min(sequence.n_padding, n_columns)
        return replace(sequence, key=key, value=value, n_padding=n_padding, survivors=survivors, small=small)
