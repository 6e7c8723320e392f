"""Counters of stored tokens and bytes, filled while a model runs."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, final

from torch import nn

from artifacts.codes import Codes
from artifacts.model.hooks import check_seen
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.cache.store.token_store import TokenStore

CONTEXT_TOKENS = (2048, 32768, 131072)
"""Context lengths over which reports amortise static bytes."""


@final
@dataclass(frozen=True)
class StoredBytes:
    """Bytes of stored keys and values, tokens in full precision included.

    Parameters
    ----------
    n_elements : int
        Stored elements: tokens times channels.
    size_bytes : int
        Bytes of codes, scales, full-precision tokens and running scales.
    plain_bytes : int
        Bytes of the same elements in the dtype of the model.
    """

    n_elements: int = 0
    size_bytes: int = 0
    plain_bytes: int = 0

    @classmethod
    def of(cls, stores: Iterable[TokenStore]) -> "StoredBytes":
        """Bytes of some stores; tensors that beams share count once for each beam."""
        return sum((cls._of(store) for store in stores), start=cls())

    @property
    def bits(self) -> float:
        """Bits per element; nan if nothing is held."""
        return 8 * self.size_bytes / self.n_elements if self.n_elements else float("nan")

    @property
    def memory_ratio(self) -> float:
        """Bytes over unquantized bytes; nan if nothing is held."""
        return self.size_bytes / self.plain_bytes if self.plain_bytes else float("nan")

    def __add__(self, other: "StoredBytes") -> "StoredBytes":
        return StoredBytes(
            self.n_elements + other.n_elements,
            self.size_bytes + other.size_bytes,
            self.plain_bytes + other.plain_bytes,
        )

    @classmethod
    def _of(cls, store: TokenStore) -> "StoredBytes":
        # Codes remember the dtype that they were encoded from; tokens in full precision still have it.
        itemsize = next((codes.dtype.itemsize for codes in store.blocks), 0)
        n_channels = store.quantizer.channels
        return cls(
            n_elements=(store.n_encoded + store.n_exact) * n_channels,
            size_bytes=sum(tensor.nbytes for tensor in store.tensors()),
            plain_bytes=store.n_encoded * n_channels * itemsize + store.exact_bytes,
        )


@dataclass
class SiteUsage:
    """Counters of one site.

    Parameters
    ----------
    n_encoded, n_exact : int
        Tokens that were encoded, and tokens that the policy keeps in full precision.
    encoded_bytes, exact_bytes : int
        Bytes of each of the two.
    replaced_bytes : int
        Bytes of the encoded tokens in the dtype of the model.
    n_small : int
        Tokens in full precision for their small key norms, part of `n_exact`; they also have codes.
    n_kept : int
        Encoded tokens that the quantizer keeps as they came; their values are part of `encoded_bytes`.
    n_padding : int
        Padding columns, for which nothing is stored.
    """

    n_encoded: int = 0
    n_exact: int = 0
    encoded_bytes: int = 0
    exact_bytes: int = 0
    replaced_bytes: int = 0
    n_small: int = 0
    n_kept: int = 0
    n_padding: int = field(default=0, compare=False)


@dataclass
class Usage:
    """Counters of all sites while a model runs."""

    quantizers: Mapping[Site, Quantizer]
    sites: dict[Site, SiteUsage] = field(default_factory=lambda: defaultdict(SiteUsage))

    def add(self, site: Site, codes: Codes) -> None:
        """Counts encoded tokens and their bytes."""
        self.sites[site].n_encoded += codes.shape[0]
        self.sites[site].encoded_bytes += codes.nbytes
        self.sites[site].replaced_bytes += math.prod(codes.shape) * codes.dtype.itemsize
        self.sites[site].n_kept += _n_kept(self.quantizers[site], codes)

    def add_exact(self, site: Site, n_tokens: int, nbytes: int) -> None:
        """Counts tokens in full precision and their bytes."""
        self.sites[site].n_exact += n_tokens
        self.sites[site].exact_bytes += nbytes

    def add_padding(self, site: Site, n_columns: int) -> None:
        """Counts padding columns of a forward pass."""
        self.sites[site].n_padding += n_columns

    def add_store(self, site: Site, store: TokenStore) -> None:
        """Counts the tokens and bytes that a cache holds for a sequence."""
        self.sites[site].n_encoded += store.n_encoded
        self.sites[site].encoded_bytes += store.encoded_bytes
        self.sites[site].replaced_bytes += StoredBytes.of([store]).plain_bytes - store.exact_bytes
        # Tokens with small key norms are part of n_exact; their unread codes are part of encoded_bytes.
        self.sites[site].n_small += store.n_small
        self.sites[site].n_kept += sum(_n_kept(store.quantizer, codes) for codes in store.blocks) - store.n_small
        self.add_exact(site, store.n_exact, store.exact_bytes)

    def include(self, other: "Usage") -> None:
        """Adds the counts of another run."""
        for site, use in other.sites.items():
            for counter in fields(SiteUsage):
                setattr(
                    self.sites[site], counter.name, getattr(self.sites[site], counter.name) + getattr(use, counter.name)
                )

    @property
    def quantized_fraction(self) -> float:
        """Share of the tokens, over all sites, that quantizers of fewer than 16 bits have encoded and not kept."""
        # Quantizers of 16 bits or more (identity) encode without loss, and kept tokens have 16 bits (`ExactSinks`):
        # neither count as quantized.
        total = sum(use.n_encoded + use.n_exact for use in self.sites.values())
        lossy = [use for site, use in self.sites.items() if self.quantizers[site].spec.bits < 16]
        return sum(use.n_encoded - use.n_kept for use in lossy) / total if total else 0.0

    def bits(self, tensor: str) -> float:
        """Stored bits per element of the encoded keys or values, without static bytes."""
        chosen = self._chosen(tensor)
        elements = sum(use.n_encoded * self.quantizers[site].channels for site, use in chosen.items())
        return 8 * sum(use.encoded_bytes for use in chosen.values()) / elements if elements else 0.0

    @property
    def average_bits(self) -> float:
        """Stored bits per element over all keys and values, full-precision tokens included, without static bytes."""
        stored = sum(use.encoded_bytes + use.exact_bytes for use in self.sites.values())
        elements = sum((use.n_encoded + use.n_exact) * self.quantizers[s].channels for s, use in self.sites.items())
        return 8 * stored / elements if elements else 0.0

    def static_bytes(self, tensor: str) -> int:
        """Bytes of calibrated scales, codebooks and thresholds, stored once for any number of tokens."""
        return sum(self.quantizers[site].static_bytes for site in self._chosen(tensor))

    def amortised_bits(self, tensor: str, context_tokens: int, exact_tokens: int) -> float:
        """Bits per element of a cache of `context_tokens` tokens: codes, full-precision tokens and static bytes.

        Tokens with small key norms are counted in the share seen so far, an upper bound, since they grow rarer.
        """
        chosen = self._chosen(tensor)
        total = 0.0
        # Bytes per encoded and per full-precision token, times their expected numbers in the context, plus the static
        # bytes once per sequence. A short run in which a site encoded nothing counts its tokens in full precision.
        for site, use in chosen.items():
            per_exact = (use.exact_bytes + use.replaced_bytes) / ((use.n_exact + use.n_encoded) or 1)
            per_encoded = use.encoded_bytes / use.n_encoded if use.n_encoded else per_exact
            n_left = context_tokens - exact_tokens
            n_small = n_left * use.n_small / ((use.n_encoded + use.n_small) or 1)
            total += (n_left - n_small) * per_encoded + (exact_tokens + n_small) * per_exact
            total += self.quantizers[site].static_bytes
        channels = sum(self.quantizers[site].channels for site in chosen)
        return 8 * total / (context_tokens * channels) if channels else 0.0

    def n_tokens(self) -> dict[Site, int]:
        """Columns of each site so far, padding included."""
        used = {site: self.sites[site] for site in self.quantizers}
        return {site: use.n_encoded + use.n_exact + use.n_padding for site, use in used.items()}

    def _chosen(self, tensor: str) -> dict[Site, SiteUsage]:
        return {site: use for site, use in self.sites.items() if site.tensor == tensor}


def _n_kept(quantizer: Quantizer, codes: Codes) -> int:
    exact = quantizer.exact_tokens(codes)
    return 0 if exact is None else int(exact.sum())


@contextmanager
def counted_passes(model: nn.Module, usage: Usage) -> Iterator[None]:
    """Context that checks after every forward pass that each site has counted tokens.

    Raises
    ------
    UnsupportedModelError
        After a pass in which some site has not.
    """
    # A site that counts no token in a pass was never reached by its hook: a renamed projection, or another code path.
    before: dict[Site, int] = {}

    def start(*_: Any) -> None:
        before.update(usage.n_tokens())

    def end(*_: Any) -> None:
        check_seen(model, [site for site, n_tokens in usage.n_tokens().items() if n_tokens == before[site]])

    module = getattr(model, "_orig_mod", model)
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(start).remove)
        stack.callback(module.register_forward_hook(end).remove)
        yield
