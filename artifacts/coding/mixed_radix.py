"""Mixed-radix packing: codes of any number of levels as the digits of one integer."""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from artifacts.coding.packing import pack, unpack
from artifacts.errors import InvalidValueError

_WORD_BITS = 56
"""Longest word in bits: shifted by up to seven bits it still fits a signed 64-bit integer."""

_TOO_LONG = 2**63
"""Initial value of a minimum, above the bits of any token."""

_TOKENS = 512
"""Tokens packed at a time, so that their words stay in the processor's cache."""


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
        longest = max((stop - start for start, stop, _ in words), default=0)
        places = [(digit, w) for w, (start, stop, _) in enumerate(words) for digit in range(stop - start)]
        radices = torch.ones(longest, len(words), 1, dtype=torch.int64)
        for (digit, word), channel in zip(places, coded, strict=True):
            radices[digit, word] = n_levels[channel]
        widths = torch.tensor([width for _, _, width in words], dtype=torch.int64)
        # Words follow one another without gaps: a word of up to 56 bits may start at any bit of a byte, so that it
        # touches at most 8 bytes.
        first_bit = widths.cumsum(0) - widths
        self._layout = {
            "coded": torch.tensor(coded, dtype=torch.int64),
            "place": torch.tensor([digit * len(words) + word for digit, word in places], dtype=torch.int64),
            "radices": radices,
            "first_byte": first_bit // 8,
            "shift": (first_bit % 8)[:, None],
            "mask": (1 << widths[:, None]) - 1,
        }
        self._layouts = {torch.device("cpu"): self._layout}
        self.bytes_per_token = _whole_bytes(words)

    def pack(self, codes: Integer[Tensor, "tokens channels"]) -> UInt8[Tensor, "tokens bytes"]:
        """Codes as bytes; quickest where `codes` is the transpose of a contiguous tensor."""
        packed = [self._pack(part.to(torch.uint8).T).T for part in codes.split(_TOKENS)]
        return torch.cat(packed) if packed else codes.new_zeros(0, self.bytes_per_token, dtype=torch.uint8)

    def unpack(self, packed: UInt8[Tensor, "tokens bytes"]) -> UInt8[Tensor, "tokens channels"]:
        """Codes that `pack` stored, as the transpose of a contiguous tensor.

        Raises
        ------
        ValueError
            If the rows have another number of bytes.
        """
        if packed.shape[1] != self.bytes_per_token:
            raise InvalidValueError(f"unpack: expected {self.bytes_per_token} bytes a token, got {packed.shape[1]}")
        codes = torch.zeros(self.channels, len(packed), dtype=torch.uint8, device=packed.device)
        for part, rows in zip(codes.split(_TOKENS, dim=1), packed.split(_TOKENS), strict=True):
            self._unpack(rows.T, part)
        return codes.T

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """Layout of the codes as tensors that are cached per device.

        The coded channels, the position of their digits in "digits words", the radices at these positions, and for
        each word its first byte, its bit shift in that byte, and a mask of its bits.
        """
        if device not in self._layouts:
            self._layouts[device] = {name: tensor.to(device) for name, tensor in self._layout.items()}
        return self._layouts[device]

    def _pack(self, codes: UInt8[Tensor, "channels tokens"]) -> UInt8[Tensor, "bytes tokens"]:
        layout, n_tokens = self._on(codes.device), codes.shape[1]
        n_digits, n_words, _ = layout["radices"].shape
        digits = codes.new_zeros(n_digits * n_words, n_tokens)
        digits[layout["place"]] = codes[layout["coded"]]
        words = torch.zeros(n_words, n_tokens, dtype=torch.int64, device=codes.device)
        by_digit = digits.view(n_digits, n_words, n_tokens)
        # Horner: word = d0 + r0 (d1 + r1 (d2 + ...)), from the last digit to the first (Knuth, TAOCP vol. 2, 4.1).
        for radices, digit in zip(layout["radices"].flip(0), by_digit.flip(0), strict=True):
            words.mul_(radices).add_(digit)
        words <<= layout["shift"]
        rows = torch.zeros(self.bytes_per_token + 8, n_tokens, dtype=torch.int64, device=codes.device)
        # Words have no bit in common, even within a byte of two words: adding their bytes is a bitwise or.
        for byte in range(8):
            rows.index_add_(0, layout["first_byte"] + byte, words >> 8 * byte & 0xFF)
        return rows[: self.bytes_per_token].to(torch.uint8)

    def _unpack(self, packed: UInt8[Tensor, "bytes tokens"], codes: UInt8[Tensor, "channels tokens"]) -> None:
        layout = self._on(packed.device)
        rows = torch.nn.functional.pad(packed, (0, 0, 0, 8)).long()
        words = rows[layout["first_byte"]]
        for byte in range(1, 8):
            words |= rows[layout["first_byte"] + byte] << 8 * byte
        words = words >> layout["shift"] & layout["mask"]
        digits = codes.new_zeros(len(layout["radices"]), *words.shape)
        # The inverse: digit = word mod r, word = word div r. The remainder as word - r * quotient saves a division.
        for radices, digit in zip(layout["radices"], digits, strict=True):
            rest = words.div(radices, rounding_mode="floor")
            digit.copy_(words.addcmul_(rest, radices, value=-1))
            words = rest
        codes[layout["coded"]] = digits.flatten(0, 1)[layout["place"]]


def bytes_per_token(n_levels: Sequence[int]) -> int:
    """Bytes per token that `MixedRadix` needs for these numbers of levels."""
    return _whole_bytes(_cut([n for n in n_levels if n > 1]))


def pack_levels(codes: UInt8[Tensor, "tokens channels"], n_levels: int) -> UInt8[Tensor, "tokens bytes"]:
    """Packs codes of `n_levels` values each: as plain bits for a power of two, else in mixed radix."""
    bits = (n_levels - 1).bit_length()
    return pack(codes, bits) if n_levels == 2**bits else _same_radix(codes.shape[1], n_levels).pack(codes)


def unpack_levels(
    packed: UInt8[Tensor, "tokens bytes"], n_levels: int, channels: int
) -> UInt8[Tensor, "tokens channels"]:
    """Codes that `pack_levels` stored."""
    bits = (n_levels - 1).bit_length()
    return unpack(packed, bits, channels) if n_levels == 2**bits else _same_radix(channels, n_levels).unpack(packed)


@functools.lru_cache(maxsize=64)
def _same_radix(channels: int, n_levels: int) -> MixedRadix:
    return MixedRadix([n_levels] * channels)


def _whole_bytes(words: Sequence[tuple[int, int, int]]) -> int:
    return -(-sum(width for _, _, width in words) // 8)


def _cut(n_levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Words as (first digit, last digit + 1, bits), the partition with the fewest bits in total."""
    # A word of radices r_i needs ceil(log2 prod r_i) bits, so long words waste less, up to 56 bits. Dynamic programming
    # from the end: bits[i] = min over stop of width(i .. stop) + bits[stop]; `<=` takes the longest of equal words.
    n_digits = len(n_levels)
    bits, stops = [0] * (n_digits + 1), [0] * n_digits
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
