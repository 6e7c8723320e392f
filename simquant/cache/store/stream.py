"""One sequence of a batch at one layer of a packed cache."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from artifacts.sites import Site
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.cache.store.small_norms import SmallNorms
from simquant.cache.store.survivors import Survivors
from simquant.cache.store.token_store import TokenStore


@dataclass(frozen=True)
class Stream:
    """One sequence at one layer.

    Parameters
    ----------
    key, value : TokenStore
        Its tokens, padding left out.
    n_padding : int
        Columns of the batch before its first token.
    survivors : Survivors or None
        Which tokens are held; None where none is ever evicted.
    small : SmallNorms or None
        Which tokens are kept exact for the small norm of their keys; None where none ever is.
    """

    key: TokenStore
    value: TokenStore
    n_padding: int = 0
    survivors: Survivors | None = None
    small: SmallNorms | None = None

    def stores(self) -> tuple[TokenStore, TokenStore]:
        """Both."""
        return self.key, self.value

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of tokens that are read together, from the first that both still have."""
        return max(self.stores(), key=lambda store: store.first_token).spans()

    def columns(self, tokens: slice) -> slice | Int64[Tensor, " tokens"]:
        """Where held tokens stand in the batch."""
        if self.survivors is not None:
            return self.survivors.columns(tokens, self.n_padding)
        return slice(self.n_padding + tokens.start, self.n_padding + tokens.stop)

    def appended(
        self, rows: Mapping[Site, Float[Tensor, "tokens channels"]], sources: DecodedSources, sequence: int
    ) -> "Stream":
        """With the tokens that follow: keys, then values. `sequence` is its number in the batch."""
        key, _ = rows.values()
        small, kept = (None, None) if self.small is None else self.small.extended(key)
        for store, (site, own) in zip(self.stores(), rows.items(), strict=True):
            store.append(own, kept, partial(sources.context, site, own.device, sequence))
            if sources.are_kept_of(site):
                sources.keep(site, store.decode_all(), sequence)
        survivors = None if self.survivors is None else self.survivors.extended(len(key))
        return replace(self, survivors=survivors, small=small)

    def to(self, device: torch.device) -> "Stream":
        """On another device."""
        survivors = None if self.survivors is None else self.survivors.to(device)
        small = None if self.small is None else self.small.to(device)
        key, value = self.key.to(device), self.value.to(device)
        return replace(self, key=key, value=value, survivors=survivors, small=small)

    def keep(self, kept: Bool[Tensor, " held"]) -> "Stream":
        """With the tokens alone where `kept` is true."""
        if kept.all():
            return self
        for store in self.stores():
            store.keep(kept)
        return self if self.survivors is None else replace(self, survivors=self.survivors.without(kept))

    def after_prompt(self) -> "Stream":
        """At the end of the first step; unchanged at that of another."""
        if self.survivors is None or self.survivors.n_prompt:
            return self
        return replace(self, survivors=self.survivors.after_prompt())
