"""Settings of KIVI (arXiv 2402.02750), their quantizers and cache policy, and the memory that they save."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from artifacts.errors import InvalidValueError
from artifacts.model.attention import AttentionLayer
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site
from simquant.cache.store.token_store import TokenStore
from simquant.policy.policy import CachePolicy
from simquant.usage import StoredBytes


@final
@dataclass(frozen=True, kw_only=True)
class KIVISettings:
    """KIVI's quantization: rotated keys per channel over groups of tokens, values per token over groups of channels.

    Recent tokens form a residual window in full precision. Scale and offset of a group are float16; the offset is not
    clamped, so that a group far from zero keeps its precision. Prefill attends in full precision.

    Parameters
    ----------
    k_bits, v_bits : int
        Bits of keys and of values, 1 to 8; 16 leaves them in full precision.
    group_size : int
        Elements that share a scale, from 2: tokens of a channel for keys, channels of a token for values, at most a
        head.
    residual_length : int
        Most recent tokens in full precision, from 0. Tokens are encoded in whole groups, so that there are up to
        `group_size - 1` more.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    k_bits: int = 2
    v_bits: int = 2
    group_size: int = 32
    residual_length: int = 128

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits"):
            bits = getattr(self, name)
            if type(bits) is not int or bits not in (*range(1, 9), 16):
                raise InvalidValueError(
                    f"KIVI: {name} must be an integer from 1 to 8, or 16 for full precision; got {bits!r}"
                )
        for name, least in (("group_size", 2), ("residual_length", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InvalidValueError(f"KIVI: {name} must be an integer from {least}; got {value!r}")

    @property
    def policy(self) -> CachePolicy:
        """Cache policy of these settings."""
        # Keys need blocks of group_size tokens for their per-channel scales; values, with per-token scales, leave the
        # window together with them. KIVI itself attends in full precision over the prompt, then encodes it.
        return CachePolicy(residual_tokens=self.residual_length, block_tokens=self.group_size, exact_prefill=True)

    def quantizers(self, layers: Sequence[AttentionLayer]) -> dict[Site, Quantizer]:
        """Quantizers of all keys and values of a model's layers."""
        return {
            site: quantizer.at(site)
            for layer in layers
            for site, quantizer in (
                (Site(layer.layer, "key", "post_rope"), self.key_quantizer(layer.channels)),
                (Site(layer.layer, "value"), self.value_quantizer(layer.channels, layer.head_dim)),
            )
        }

    def key_quantizer(self, channels: int) -> Quantizer:
        """Quantizer of the keys of one layer."""
        if self.k_bits == 16:
            return Identity(channels=channels)
        return DynamicAffine(channels=channels, bits=self.k_bits, per="channel", group_size=self.group_size)

    def value_quantizer(self, channels: int, head_dim: int) -> Quantizer:
        """Quantizer of the values of one layer.

        Raises
        ------
        ValueError
            If a token does not consist of whole groups.
        """
        if self.v_bits == 16:
            return Identity(channels=channels)
        group_size = min(self.group_size, head_dim)
        return DynamicAffine(channels=channels, bits=self.v_bits, per="token", group_size=group_size)


def memory_savings(
    seq_len: int, *, head_dim: int = 128, dtype: torch.dtype = torch.float16, **settings: int
) -> dict[str, int | float]:
    """Memory of one head of one layer after `seq_len` tokens, measured by storing as many.

    Parameters
    ----------
    seq_len : int
        Tokens of a sequence, from 1.
    head_dim : int
        Channels of a head.
    dtype : torch.dtype
        Dtype of the model.
    **settings
        See `KIVISettings`.

    Returns
    -------
    dict
        compression_ratio, memory_ratio (its inverse), effective_bits per element, size_bytes, plain_bytes.

    Examples
    --------
    >>> [round(memory_savings(tokens, k_bits=2, v_bits=2)["compression_ratio"], 2) for tokens in (1024, 4096)]
    [3.46, 4.7]
    """
    if type(seq_len) is not int or seq_len < 1:
        raise InvalidValueError(f"memory_savings: seq_len must be an integer from 1; got {seq_len!r}")
    kivi = KIVISettings(**settings)
    # One block for the whole sequence, rounded up to groups. Sizes depend on shapes alone, so that zeros will do.
    block_tokens = -(-seq_len // kivi.group_size) * kivi.group_size
    stores = []
    for quantizer in (kivi.key_quantizer(head_dim), kivi.value_quantizer(head_dim, head_dim)):
        store = TokenStore(quantizer, kivi.policy, kivi.policy.window("key"), block_tokens)
        store.append(torch.zeros(seq_len, head_dim, dtype=dtype))
        stores.append(store)
    stored = StoredBytes.of(stores)
    return {
        "compression_ratio": 1 / stored.memory_ratio,
        "memory_ratio": stored.memory_ratio,
        "effective_bits": stored.bits,
        "size_bytes": stored.size_bytes,
        "plain_bytes": stored.plain_bytes,
    }
