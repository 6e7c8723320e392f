# mypy: ignore-errors
"""Triton functions that read packed codes, two to a register.

A word of 32 bits holds codes i and i + pairs at bits `bits * i` and `bits * i + 16`: one shift, one mask and the
exponent of 1024 make two float16 numbers of them, 1024 + code. So the channels of a head come in an order of their own,
`channel_order`, which the sums over channels do not notice and the last store undoes. Three bits are no divisor of 32:
there a word is made of the three bytes of eight codes.

Triton compiles what follows a branch that returns: hence each `else` behind one.
"""

from simquant.kernels.language import constexpr, jit, tl


@jit
def pairs_in(BITS: constexpr):
    """Half of the codes that a word holds."""
    return tl.constexpr(4 if BITS == 3 else 16 // BITS)


@jit
def channel_order(BITS: constexpr, N: constexpr):
    """Order in which the N channels come out of their words."""
    PAIRS: tl.constexpr = pairs_in(BITS)
    WORDS: tl.constexpr = N // (2 * PAIRS)
    k = tl.arange(0, N)
    return (k // 2) % WORDS * (2 * PAIRS) + (k // 2) // WORDS + (k % 2) * PAIRS


@jit
def load_words(side, row, live, first_channel, CHANNELS: constexpr, N: constexpr):
    """The words of N channels, "tokens words"."""
    BITS: tl.constexpr = side.bits
    WORDS: tl.constexpr = N // (2 * pairs_in(BITS))
    word = tl.arange(0, WORDS)[None, :]
    if BITS == 3:
        at = side.codes + (row[:, None] * CHANNELS + first_channel) // 8 * 3 + word * 3
        low = tl.load(at, mask=live[:, None], other=0).to(tl.int32)
        middle = tl.load(at + 1, mask=live[:, None], other=0).to(tl.int32)
        high = tl.load(at + 2, mask=live[:, None], other=0).to(tl.int32)
        # codes 0 to 3 are the low 12 bits, codes 4 to 7 the high ones
        return low | ((middle & 15) << 8) | ((middle >> 4) << 16) | (high << 20)
    else:
        at = side.codes + (row[:, None] * CHANNELS + first_channel) * BITS // 32 + word
        return tl.load(at, mask=live[:, None], other=0)


@jit
def load_steps(side, row, live, first_channel, CHANNELS: constexpr, N: constexpr):
    """Factors of the scales, in float16 where it is exact: codes around their centre, or levels; "tokens channels"."""
    BITS: tl.constexpr = side.bits
    PAIRS: tl.constexpr = pairs_in(BITS)
    word = load_words(side, row, live, first_channel, CHANNELS, N)
    shift = (tl.arange(0, PAIRS) * BITS)[None, :, None]
    pair = (word[:, None, :] >> shift) & ((2**BITS - 1) * 0x00010001)
    if side.levels is None:
        pair = pair | 0x64006400
    halves = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    halves = tl.reshape(halves, (row.shape[0], N))
    if side.levels is None:
        return halves.to(tl.float16, bitcast=True) - (1024.0 + side.centre)
    else:
        channel = first_channel + channel_order(BITS, N)
        return tl.load(side.levels + (channel * side.level_stride)[None, :] + halves)


@jit
def load_scale(side, row, channel, live):
    """Scale and offset of every row and channel, which broadcast; 0 where dead."""
    cell = row // side.span * side.per_row + channel // side.group
    scale = tl.load(side.scale + cell, mask=live, other=0.0).to(tl.float32)
    if side.offset is None:
        return scale, tl.zeros_like(scale)
    else:
        return scale, tl.load(side.offset + cell, mask=live, other=0.0).to(tl.float32)


@jit
def load_values(side, row, live, first_channel, CHANNELS: constexpr, N: constexpr):
    """Values in float32, "tokens channels"."""
    steps = load_steps(side, row, live, first_channel, CHANNELS, N).to(tl.float32)
    channel = first_channel + channel_order(side.bits, N)
    scale, offset = load_scale(side, row[:, None], channel[None, :], live[:, None])
    return offset + scale * steps
