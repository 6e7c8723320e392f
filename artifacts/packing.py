"""Dense storage of small integers: `bits` bits a code, each token's row padded to a whole byte."""

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

_CODES_PER_WORD = 8


def packed_bytes(channels: int, bits: int) -> int:
    """Bytes that one token's codes take."""
    return -(-channels * bits // 8)


def pack(codes: Integer[Tensor, "tokens channels"], bits: int) -> UInt8[Tensor, "tokens bytes"]:
    """Codes as bytes: code j of a token stands at bit `bits * j` of its row, least significant bit first.

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
    tokens, channels = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 4:
        return _pack_nibbles(codes.to(torch.uint8))
    n_words = -(-channels // _CODES_PER_WORD)
    words = torch.nn.functional.pad(codes, (0, -channels % _CODES_PER_WORD)).view(tokens, n_words, _CODES_PER_WORD)
    word = words[..., 0].long()
    for j in range(1, _CODES_PER_WORD):
        word = word | (words[..., j].long() << (bits * j))
    shifts = torch.arange(0, 8 * bits, 8, device=codes.device)
    packed = ((word.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8).flatten(1)
    return packed[:, : packed_bytes(channels, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "tokens bytes"], bits: int, channels: int) -> UInt8[Tensor, "tokens channels"]:
    """The codes that `pack` stored.

    Raises
    ------
    ValueError
        If the rows do not have the bytes that `channels` codes of `bits` bits take.
    """
    expected = packed_bytes(channels, bits)
    if packed.shape[1] != expected:
        raise ValueError(
            f"unpack: expected {expected} bytes a token ({channels} codes of {bits} bits), got {packed.shape[1]}"
        )
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)[:, :channels]
    rows = torch.nn.functional.pad(packed, (0, -expected % bits)).view(packed.shape[0], -(-expected // bits), bits)
    word = rows[..., 0].long()
    for j in range(1, bits):
        word = word | (rows[..., j].long() << (8 * j))
    codes = [((word >> (bits * j)) & (2**bits - 1)).to(torch.uint8) for j in range(_CODES_PER_WORD)]
    return torch.stack(codes, dim=-1).flatten(1)[:, :channels]


def _pack_nibbles(codes: UInt8[Tensor, "tokens channels"]) -> UInt8[Tensor, "tokens bytes"]:
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)
