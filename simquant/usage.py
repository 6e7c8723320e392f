"""What was stored while a model ran, counted and never computed."""

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
"""Context lengths over which static bytes are spread in reports."""


@final
@dataclass(frozen=True)
class StoredBytes:
    """The bytes of some keys and values, exact tokens included.

    Parameters
    ----------
    n_elements : int
        Numbers that are held, in whatever form.
    size_bytes : int
        What they take: codes, scales, exact tokens, running states.
    plain_bytes : int
        What they would take in the dtype they came in.
    """

    n_elements: int = 0
    size_bytes: int = 0
    plain_bytes: int = 0

    @classmethod
    def of(cls, stores: Iterable[TokenStore]) -> "StoredBytes":
        """What these hold; beams are counted each by itself, also where they share memory."""
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
        Tokens that went through a quantizer, and tokens that the policy kept.
    encoded_bytes, exact_bytes : int
        What each of the two takes.
    replaced_bytes : int
        What the encoded tokens would take as they came.
    n_small : int
        Tokens among those that the policy kept whose keys have small norms; they have codes, too.
    n_padding : int
        Columns that are no tokens; nothing is stored for them.
    """

    n_encoded: int = 0
    n_exact: int = 0
    encoded_bytes: int = 0
    exact_bytes: int = 0
    replaced_bytes: int = 0
    n_small: int = 0
    n_padding: int = field(default=0, compare=False)


@dataclass
class Usage:
    """Counters of all sites during a simulation."""

    quantizers: Mapping[Site, Quantizer]
    sites: dict[Site, SiteUsage] = field(default_factory=lambda: defaultdict(SiteUsage))

    def add(self, site: Site, codes: Codes) -> None:
        """Counts what was stored for encoded tokens."""
        self.sites[site].n_encoded += codes.shape[0]
        self.sites[site].encoded_bytes += codes.nbytes
        self.sites[site].replaced_bytes += math.prod(codes.shape) * codes.dtype.itemsize

    def add_exact(self, site: Site, n_tokens: int, nbytes: int) -> None:
        """Counts tokens that stay as they are."""
        self.sites[site].n_exact += n_tokens
        self.sites[site].exact_bytes += nbytes

    def add_padding(self, site: Site, n_columns: int) -> None:
        """Counts what a pass has brought besides tokens."""
        self.sites[site].n_padding += n_columns

    def add_store(self, site: Site, store: TokenStore) -> None:
        """Counts what a cache holds for a sequence."""
        self.sites[site].n_encoded += store.n_encoded
        self.sites[site].encoded_bytes += store.encoded_bytes
        self.sites[site].replaced_bytes += StoredBytes.of([store]).plain_bytes - store.exact_bytes
        self.sites[site].n_small += store.n_small
        self.add_exact(site, store.n_exact, store.exact_bytes)

    def include(self, other: "Usage") -> None:
        """Adds what another simulation has counted."""
        for site, use in other.sites.items():
            for counter in fields(SiteUsage):
                setattr(
                    self.sites[site], counter.name, getattr(self.sites[site], counter.name) + getattr(use, counter.name)
                )

    @property
    def quantized_fraction(self) -> float:
        """Share of the tokens, over all sites, that a quantizer of fewer than 16 bits has seen."""
        total = sum(use.n_encoded + use.n_exact for use in self.sites.values())
        lossy = sum(use.n_encoded for site, use in self.sites.items() if self.quantizers[site].spec.bits < 16)
        return lossy / total if total else 0.0

    def bits(self, tensor: str) -> float:
        """StoredBytes bits per element of the encoded keys or values, static bytes left out."""
        chosen = self._chosen(tensor)
        elements = sum(use.n_encoded * self.quantizers[site].channels for site, use in chosen.items())
        return 8 * sum(use.encoded_bytes for use in chosen.values()) / elements if elements else 0.0

    @property
    def average_bits(self) -> float:
        """StoredBytes bits per element over all keys and values, exact tokens included, static bytes left out."""
        stored = sum(use.encoded_bytes + use.exact_bytes for use in self.sites.values())
        elements = sum((use.n_encoded + use.n_exact) * self.quantizers[s].channels for s, use in self.sites.items())
        return 8 * stored / elements if elements else 0.0

    def static_bytes(self, tensor: str) -> int:
        """Bytes of scales, codebooks and thresholds, stored once for any number of tokens."""
        return sum(self.quantizers[site].static_bytes for site in self._chosen(tensor))

    def amortised_bits(self, tensor: str, context_tokens: int, exact_tokens: int) -> float:
        """Bits per element of a cache of `context_tokens` tokens: codes, exact tokens and static bytes.

        Tokens with keys of small norm come in the share that was seen, though they grow rarer: an upper bound.
        """
        chosen = self._chosen(tensor)
        total = 0.0
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
        """Tokens of each site so far, padding among them."""
        used = {site: self.sites[site] for site in self.quantizers}
        return {site: use.n_encoded + use.n_exact + use.n_padding for site, use in used.items()}

    def _chosen(self, tensor: str) -> dict[Site, SiteUsage]:
        return {site: use for site, use in self.sites.items() if site.tensor == tensor}


@contextmanager
def counted_passes(model: nn.Module, usage: Usage) -> Iterator[None]:
    """Every forward pass of the model inside the context adds tokens at every site.

    Raises
    ------
    UnsupportedModelError
        After a pass that did not.
    """
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
