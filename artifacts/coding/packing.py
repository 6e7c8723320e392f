"""Bit packing: `bits` bits per code, the row of each token padded to a whole byte."""

import math
import sys
from functools import reduce

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from artifacts.errors import InvalidValueError

_SPREADS: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    1: (torch.int64, ((28, 0x0000000F_0000000F), (14, 0x00030003_00030003), (7, 0x01010101_01010101))),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    4: (torch.int16, ((4, 0x0F0F),)),
    8: (torch.uint8, ()),
}
"""Integer type and (shift, mask) steps that spread a byte of several codes into one byte per code, by code width."""


def packed_bytes(channels: int, bits: int) -> int:
    """Bytes of one token's packed codes."""
    return -(-channels * bits // 8)


def pack(codes: Integer[Tensor, "tokens channels"], bits: int) -> UInt8[Tensor, "tokens bytes"]:
    """Packs codes: code j of a token is at bit `bits * j` of its row, least significant bit first.

    Parameters
    ----------
    codes : Integer[Tensor, "tokens channels"]
        Integers from 0 to 2^bits - 1.
    bits : int
        Code width, 1 to 8.

    Examples
    --------
    >>> pack(torch.tensor([[1, 2, 3, 0]]), bits=2).tolist()
    [[57]]
    """
    channels = codes.shape[1]
    if bits == 8:
        return codes.to(torch.uint8)
    n_codes, n_bytes = _word(bits)
    words = _rows_of(codes.to(torch.uint8), n_codes)
    packed = []
    # Byte k of a word holds bits 8 k .. 8 k + 7: every code that overlaps it, shifted left or right into place; uint8
    # drops what lies beyond the byte.
    for first_bit in range(0, 8 * n_bytes, 8):
        places = ((j, bits * j - first_bit) for j in range(n_codes))
        parts = [_shifted(words[..., j], shift) for j, shift in places if -bits < shift < 8]
        packed.append(reduce(torch.bitwise_or, parts))
    return torch.stack(packed, dim=-1).flatten(1)[:, : packed_bytes(channels, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "tokens bytes"], bits: int, channels: int) -> UInt8[Tensor, "tokens channels"]:
    """Codes that `pack` stored.

    Raises
    ------
    ValueError
        If the rows do not have the bytes that `channels` codes of `bits` bits take.
    """
    expected = packed_bytes(channels, bits)
    if packed.shape[1] != expected:
        raise InvalidValueError(
            f"unpack: expected {expected} bytes a token ({channels} codes of {bits} bits), got {packed.shape[1]}"
        )
    if bits in _SPREADS:
        return _spread(packed, bits)[:, :channels]
    n_codes, n_bytes = _word(bits)
    words = _rows_of(packed, n_bytes)
    codes = []
    for first_bit in range(0, bits * n_codes, bits):
        byte, bit = divmod(first_bit, 8)
        code = words[..., byte] >> bit
        if bit + bits > 8:
            code |= words[..., byte + 1] << (8 - bit)
        codes.append(code & (2**bits - 1) if bit + bits != 8 else code)
    return torch.stack(codes, dim=-1).flatten(1)[:, :channels]


def _spread(packed: UInt8[Tensor, "tokens bytes"], bits: int) -> UInt8[Tensor, "tokens codes"]:
    """Codes of whole bytes, one byte each, several times as fast as one code at a time."""
    # Bit deposit by halving (Warren, Hacker's Delight, chapter 7). For 2 bits a byte ddccbbaa becomes ddcc and bbaa, 16
    # bits apart, by x | x << 12 and a mask of nibbles; then dd, cc, bb and aa, 8 apart, by x | x << 6 and one of pairs.
    wide, steps = _SPREADS[bits]
    x = packed.to(wide)
    for shift, mask in steps:
        x |= x << shift
        x &= mask
    if sys.byteorder == "big":
        x = x.view(torch.uint8).unflatten(1, (-1, 8 // bits)).flip(-1).flatten(1)
    return x.view(torch.uint8)


def _word(bits: int) -> tuple[int, int]:
    """Smallest number of codes that fills whole bytes, and that number of bytes: lcm(bits, 8) bits."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def _rows_of(x: UInt8[Tensor, "tokens width"], size: int) -> UInt8[Tensor, "tokens words size"]:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % size)) if x.shape[1] % size else x
    words: Tensor = padded.unflatten(1, (-1, size))
    return words


def _shifted(codes: UInt8[Tensor, "tokens words"], shift: int) -> UInt8[Tensor, "tokens words"]:
    return codes << shift if shift >= 0 else codes >> -shift
