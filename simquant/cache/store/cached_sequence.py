"""One sequence of a batch at one layer of a packed cache."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from artifacts.codes import Codes
from artifacts.sites import Site
from simquant.cache.errors import CacheStateError
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.cache.store.small_norms import SmallNorms
from simquant.cache.store.token_store import TokenStore


@dataclass(frozen=True, eq=False)
class Survivors:
    """Positions, in the text, of the tokens that eviction has left in one sequence of a layer.

    Parameters
    ----------
    numbers : Int32[Tensor, "held"]
        Positions of the tokens in the cache, ascending, from 0.
    n_seen : int
        Tokens appended so far, evicted ones included.
    n_prompt, n_prompt_kept : int
        Tokens of the first step, and those left after its eviction; 0 before its end.
    evicted_at : int
        `n_seen` at the last eviction; 0 before the first.
    """

    numbers: Int32[Tensor, " held"]
    n_seen: int = 0
    n_prompt: int = 0
    n_prompt_kept: int = 0
    evicted_at: int = 0

    @staticmethod
    def none(device: torch.device) -> "Survivors":
        """Positions in an empty cache."""
        return Survivors(torch.zeros(0, dtype=torch.int32, device=device))

    def extended(self, n_tokens: int) -> "Survivors":
        """Positions after `n_tokens` more tokens."""
        n_seen = self.n_seen + n_tokens
        new = torch.arange(self.n_seen, n_seen, dtype=torch.int32, device=self.numbers.device)
        return replace(self, numbers=torch.cat([self.numbers, new]), n_seen=n_seen)

    def without(self, kept: Bool[Tensor, " held"]) -> "Survivors":
        """Positions of the tokens where `kept` is true."""
        return replace(self, numbers=self.numbers[kept], evicted_at=self.n_seen)

    def after_prompt(self) -> "Survivors":
        """Counters at the end of the first step."""
        return replace(self, n_prompt=self.n_seen, n_prompt_kept=len(self.numbers))

    def to(self, device: torch.device) -> "Survivors":
        """Copy on another device."""
        return replace(self, numbers=self.numbers.to(device))

    def columns(self, tokens: slice, n_padding: int) -> Int64[Tensor, " tokens"]:
        """Columns of the batch in which the given tokens of the cache stand."""
        return self.numbers[tokens].long() + n_padding

    def cropped(self, n_tokens: int, who: str) -> "Survivors":
        """Positions below `n_tokens`.

        Raises
        ------
        CacheStateError
            If an eviction that counted later tokens cannot be undone.
        """
        if n_tokens >= self.n_seen:
            return self
        # Tokens after the last eviction can go; before it, the choice of evicted tokens was made with attention from
        # tokens that would no longer exist.
        if n_tokens < self.evicted_at:
            raise CacheStateError(
                f"{who}: cannot crop to {n_tokens} tokens: the last eviction was at {self.evicted_at} tokens, and "
                f"evicted tokens cannot be restored. Crop to {self.evicted_at} or more, or use no eviction (assisted "
                "generation crops)."
            )
        numbers = self.numbers[: int((self.numbers < n_tokens).sum())].clone()
        n_prompt, n_kept = min(self.n_prompt, n_tokens), min(self.n_prompt_kept, len(numbers))
        return replace(self, numbers=numbers, n_seen=n_tokens, n_prompt=n_prompt, n_prompt_kept=n_kept)


@dataclass(frozen=True)
class CachedSequence:
    """Keys and values of one sequence at one layer.

    Parameters
    ----------
    key, value : TokenStore
        Stored tokens, padding left out.
    n_padding : int
        Padding columns of the batch before the first token.
    survivors : Survivors or None
        Positions of the tokens left by eviction; None without eviction.
    small : SmallNorms or None
        Tokens kept in full precision for their small key norms; None if the policy keeps none.
    """

    key: TokenStore
    value: TokenStore
    n_padding: int = 0
    survivors: Survivors | None = None
    small: SmallNorms | None = None

    def stores(self) -> tuple[TokenStore, TokenStore]:
        """The stores of keys and of values."""
        return self.key, self.value

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of tokens that are decoded together, from the first that both stores still hold."""
        return max(self.stores(), key=lambda store: store.first_token).spans()

    def encoded_blocks(self) -> Iterator[tuple[slice, Codes, Codes]]:
        """Tokens whose keys and values are both quantized, a block at a time; the last codes may hold more tokens."""
        end = min(store.encoded_end for store in self.stores())
        for (start, keys), (_, values) in zip(self.key.stored_blocks(), self.value.stored_blocks(), strict=False):
            if start < end:
                yield slice(start, min(start + keys.shape[0], end)), keys, values

    def columns(self, tokens: slice) -> slice | Int64[Tensor, " tokens"]:
        """Columns of the batch in which the given tokens of the cache stand."""
        if self.survivors is not None:
            return self.survivors.columns(tokens, self.n_padding)
        return slice(self.n_padding + tokens.start, self.n_padding + tokens.stop)

    def appended(
        self, rows: Mapping[Site, Float[Tensor, "tokens channels"]], sources: DecodedSources, sequence: int
    ) -> "CachedSequence":
        """Sequence with more tokens: `rows` are keys, then values; `sequence` is its index in the batch."""
        # Keys before values: values may be predicted from the keys of their own layer. The choice of small key norms
        # holds for both, so that a kept token is in full precision on both sides.
        key, _ = rows.values()
        small, kept = (None, None) if self.small is None else self.small.extended(key)
        for store, (site, own) in zip(self.stores(), rows.items(), strict=True):
            store.append(own, kept, partial(sources.context, site, own.device, sequence))
            if sources.are_kept_of(site):
                sources.keep(site, store.decode_all(), sequence)
        survivors = None if self.survivors is None else self.survivors.extended(len(key))
        return replace(self, survivors=survivors, small=small)

    def to(self, device: torch.device) -> "CachedSequence":
        """Copy on another device."""
        survivors = None if self.survivors is None else self.survivors.to(device)
        small = None if self.small is None else self.small.to(device)
        key, value = self.key.to(device), self.value.to(device)
        return replace(self, key=key, value=value, survivors=survivors, small=small)

    def keep(self, kept: Bool[Tensor, " held"]) -> "CachedSequence":
        """Sequence of the tokens where `kept` is true."""
        if kept.all():
            return self
        for store in self.stores():
            store.keep(kept)
        return self if self.survivors is None else replace(self, survivors=self.survivors.without(kept))

    def after_prompt(self) -> "CachedSequence":
        """Sequence at the end of the first step; unchanged after later steps."""
        if self.survivors is None or self.survivors.n_prompt:
            return self
        return replace(self, survivors=self.survivors.after_prompt())
