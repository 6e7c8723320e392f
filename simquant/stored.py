"""What caches hold against what it would take unquantized, counted."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from simquant.cache.store.token_store import TokenStore


@final
@dataclass(frozen=True)
class Stored:
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
    def of(cls, stores: Iterable[TokenStore]) -> "Stored":
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

    def __add__(self, other: "Stored") -> "Stored":
        return Stored(
            self.n_elements + other.n_elements,
            self.size_bytes + other.size_bytes,
            self.plain_bytes + other.plain_bytes,
        )

    @classmethod
    def _of(cls, store: TokenStore) -> "Stored":
        itemsize = next((codes.dtype.itemsize for codes in store.blocks), 0)
        n_channels = store.quantizer.channels
        return cls(
            n_elements=(store.n_encoded + store.n_exact) * n_channels,
            size_bytes=sum(tensor.nbytes for tensor in store.tensors()),
            plain_bytes=store.n_encoded * n_channels * itemsize + store.exact_bytes,
        )
