"""Dense storage of small integers with any number of values each: several of them as the digits of one integer."""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from artifacts.packing import pack, unpack

_WORD_BITS = 56
"""Longest word: shifted by up to seven bits it still fits a signed 64-bit integer."""

_TOO_LONG = 2**63
"""More bits than any token has."""

_TOKENS = 512
"""Tokens at a time, so that all words of some stay in the cache."""


class MixedRadix:
    """Packs one code per channel, where channel j has `n_levels[j]` values, into whole bytes for each token.

    Channels with a single value take nothing. The others are cut, in order, into words of at most 56 bits; a word is
    the integer whose digits are its channels' codes, first channel least significant. The words stand one after the
    other, each in as many bits as its largest value needs, least significant bit first; the whole is rounded up to
    bytes. The cut is the one with the fewest bits in all; of equals, the one whose first word is longest, then that
    with the longest second word, and so on. All of that is part of the format of codes: another cut is a new version.

    Parameters
    ----------
    n_levels : Sequence[int]
        Values that each channel's code can take, 1 to 256.

    Examples
    --------
    >>> radix = MixedRadix([3, 1, 5, 10])
    >>> radix.bytes_per_token
    1
    >>> radix.pack(torch.tensor([[2, 0, 4, 9]])).tolist()  # a word of 8 bits: 2 + 3 * (4 + 5 * 9)
    [[149]]
    """

    def __init__(self, n_levels: Sequence[int]) -> None:
        self.channels = len(n_levels)
        coded = [channel for channel, n in enumerate(n_levels) if n > 1]
        words = _cut([n_levels[channel] for channel in coded])
        self._longest = max((stop - start for start, stop, _ in words), default=0)
        self._place = torch.zeros(self.channels, dtype=torch.int64)  # of a channel's digit in "digits words"
        self._radices = torch.ones(self._longest, len(words), 1, dtype=torch.int64)
        for word, (start, stop, _) in enumerate(words):
            for digit, channel in enumerate(coded[start:stop]):
                self._place[channel] = digit * len(words) + word
                self._radices[digit, word] = n_levels[channel]
        self._coded = torch.tensor(coded, dtype=torch.int64)
        widths = torch.tensor([width for _, _, width in words], dtype=torch.int64)
        self._widths, self._first_bit = widths[:, None], widths.cumsum(0) - widths
        self.bytes_per_token = _whole_bytes(words)

    def pack(self, codes: Integer[Tensor, "tokens channels"]) -> UInt8[Tensor, "tokens bytes"]:
        """Codes as bytes; quickest where `codes` is the transpose of a contiguous tensor."""
        packed = [self._pack(part.to(torch.uint8).T).T for part in codes.split(_TOKENS)]
        return torch.cat(packed) if packed else codes.new_zeros(0, self.bytes_per_token, dtype=torch.uint8)

    def unpack(self, packed: UInt8[Tensor, "tokens bytes"]) -> UInt8[Tensor, "tokens channels"]:
        """The codes that `pack` stored, as the transpose of a contiguous tensor.

        Raises
        ------
        ValueError
            If the rows have another number of bytes.
        """
        if packed.shape[1] != self.bytes_per_token:
            raise ValueError(f"unpack: expected {self.bytes_per_token} bytes a token, got {packed.shape[1]}")
        codes = torch.zeros(self.channels, len(packed), dtype=torch.uint8, device=packed.device)
        for part, rows in zip(codes.split(_TOKENS, dim=1), packed.split(_TOKENS), strict=True):
            self._unpack(rows.T, part)
        return codes.T

    def _pack(self, codes: UInt8[Tensor, "channels tokens"]) -> UInt8[Tensor, "bytes tokens"]:
        device, n_tokens = codes.device, codes.shape[1]
        digits = codes.new_zeros(self._radices.numel(), n_tokens)
        digits[self._place[self._coded].to(device)] = codes[self._coded.to(device)]
        words = torch.zeros(self._radices.shape[1], n_tokens, dtype=torch.int64, device=device)
        for radices, digit in zip(
            self._radices.to(device).flip(0), digits.view(len(self._radices), *words.shape).flip(0), strict=True
        ):
            words.mul_(radices).add_(digit)
        words <<= (self._first_bit % 8).to(device)[:, None]
        rows = torch.zeros(self.bytes_per_token + 8, n_tokens, dtype=torch.int64, device=device)
        for byte in range(8):  # words share no bits, so that adding is joining
            rows.index_add_(0, (self._first_bit // 8 + byte).to(device), words >> 8 * byte & 0xFF)
        return rows[: self.bytes_per_token].to(torch.uint8)

    def _unpack(self, packed: UInt8[Tensor, "bytes tokens"], codes: UInt8[Tensor, "channels tokens"]) -> None:
        device = packed.device
        rows = torch.nn.functional.pad(packed, (0, 0, 0, 8)).long()
        first = (self._first_bit // 8).to(device)
        words = rows[first]
        for byte in range(1, 8):
            words |= rows[first + byte] << 8 * byte
        words = words >> (self._first_bit % 8).to(device)[:, None] & (1 << self._widths.to(device)) - 1
        digits = codes.new_zeros(self._radices.shape[0], *words.shape)
        for radices, digit in zip(self._radices.to(device), digits, strict=True):
            rest = words.div(radices, rounding_mode="floor")
            digit.copy_(words.addcmul_(rest, radices, value=-1))
            words = rest
        codes[self._coded.to(device)] = digits.flatten(0, 1)[self._place[self._coded].to(device)]


def bytes_per_token(n_levels: Sequence[int]) -> int:
    """What `MixedRadix` of these numbers of levels takes."""
    return _whole_bytes(_cut([n for n in n_levels if n > 1]))


def pack_levels(codes: UInt8[Tensor, "tokens channels"], n_levels: int) -> UInt8[Tensor, "tokens bytes"]:
    """Codes of `n_levels` values each: whole bits where that is a power of two, else in mixed radix."""
    bits = (n_levels - 1).bit_length()
    return pack(codes, bits) if n_levels == 2**bits else _same_radix(codes.shape[1], n_levels).pack(codes)


def unpack_levels(
    packed: UInt8[Tensor, "tokens bytes"], n_levels: int, channels: int
) -> UInt8[Tensor, "tokens channels"]:
    """The codes that `pack_levels` stored."""
    bits = (n_levels - 1).bit_length()
    return unpack(packed, bits, channels) if n_levels == 2**bits else _same_radix(channels, n_levels).unpack(packed)


@functools.lru_cache(maxsize=64)
def _same_radix(channels: int, n_levels: int) -> MixedRadix:
    return MixedRadix([n_levels] * channels)


def _whole_bytes(words: Sequence[tuple[int, int, int]]) -> int:
    return -(-sum(width for _, _, width in words) // 8)


def _cut(n_levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Words as (first digit, last digit + 1, bits), fewest bits in all."""
    n_digits = len(n_levels)
    bits, stops = [0] * (n_digits + 1), [0] * n_digits  # from each digit on, and the end of its word
    for start in reversed(range(n_digits)):
        product, least = 1, _TOO_LONG
        for stop in range(start + 1, n_digits + 1):
            product *= n_levels[stop - 1]
            width = (product - 1).bit_length()
            if width > _WORD_BITS:
                break
            if bits[stop] + width <= least:
                least, stops[start] = bits[stop] + width, stop
        bits[start] = least
    words, start = [], 0
    while start < n_digits:
        words.append((start, stops[start], bits[start] - bits[stops[start]]))
        start = stops[start]
    return words
