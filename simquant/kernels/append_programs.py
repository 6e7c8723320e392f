# mypy: ignore-errors
"""Triton programs that quantize and pack: the arithmetic of `artifacts`, operation for operation.

They are started without fused multiply-adds, which round once where PyTorch rounds twice.
"""

from simquant.kernels.language import constexpr, jit, tl


@jit
def round_half_even(x):
    """Whole numbers nearest to |x| < 2^22: there adding 1.5 * 2^23 leaves no place for a fraction."""
    return (x + 12582912.0) - 12582912.0


@jit
def half_outward(x, UP: constexpr):
    """`x` in float16, rounded up to a positive number, or down."""
    half = x.to(tl.float16)
    off = half.to(tl.float32) < x if UP else half.to(tl.float32) > x
    off = off & (tl.abs(half.to(tl.float32)) < float("inf"))  # what does not fit stays infinite, for `append` to refuse
    pattern = (half + 0.0).to(tl.int16, bitcast=True).to(tl.int32)
    away_from_zero = half >= 0 if UP else half <= 0
    pattern = tl.where(away_from_zero, pattern + 1, pattern - 1)
    if not UP:
        pattern = tl.where(half == 0, -32767, pattern)  # the smallest negative number
    half = tl.where(off, pattern.to(tl.int16).to(tl.float16, bitcast=True), half)
    if UP:
        half = tl.where(half > 0, half, 5.9604644775390625e-08).to(tl.float16)  # 2^-24, the smallest positive number
    return half


@jit
def parameters(
    x,
    scale,
    offset,
    clip_ratio,
    n_tokens,
    CHANNELS: constexpr,
    SPAN: constexpr,
    PER_ROW: constexpr,
    GROUP: constexpr,
    BITS: constexpr,
    SYMMETRIC: constexpr,
    WHOLE: constexpr,
    CELLS: constexpr,
    BLOCK: constexpr,
):
    """Scale and offset of `CELLS` cells: the `SPAN` tokens by `GROUP` channels that share them."""
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    row, column = cell // PER_ROW * SPAN, cell % PER_ROW * GROUP
    low = tl.full((CELLS,), float("inf"), tl.float32)
    high = tl.full((CELLS,), float("-inf"), tl.float32)
    for start in range(0, SPAN * GROUP, BLOCK):
        inside = start + tl.arange(0, BLOCK)[None, :]
        token = row[:, None] + inside // GROUP
        live = (inside < SPAN * GROUP) & (token < n_tokens)
        found = tl.load(x + token * CHANNELS + column[:, None] + inside % GROUP, mask=live, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(live, found, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(live, found, float("-inf")), axis=1))
    live = row < n_tokens
    low, high = tl.where(live, low, 0.0), tl.where(live, high, 0.0)
    if clip_ratio < 1:
        middle, reach = (low + high) / 2, (high - low) / 2 * clip_ratio
        low, high = middle - reach, middle + reach
    STEPS: tl.constexpr = 2**BITS - 1
    if SYMMETRIC:
        step = half_outward(tl.div_rn(tl.maximum(-low, high), 2.0 ** (BITS - 1) - 1), True)
    elif WHOLE:
        step = half_outward(tl.div_rn(high - low, STEPS * 1.0), True)
        zero_point = round_half_even(tl.clamp(tl.div_rn(-low, step.to(tl.float32)), 0.0, STEPS * 1.0))
        tl.store(offset + cell, half_outward(-zero_point * step.to(tl.float32), False), mask=live)
    else:
        least = half_outward(low, False)
        step = half_outward(tl.div_rn(high - least.to(tl.float32), STEPS * 1.0), True)
        tl.store(offset + cell, least, mask=live)
    tl.store(scale + cell, step, mask=live)


@jit
def codes_of_steps(y, BITS: constexpr, CENTRE: constexpr):
    """The nearest step; values beyond the range saturate."""
    TOP: tl.constexpr = 2 * CENTRE if CENTRE else 2**BITS - 1
    return round_half_even(tl.clamp(y, 0.0, TOP * 1.0)).to(tl.int32)


@jit
def codes_of_boundaries(y, table, BITS: constexpr):
    """How many of the 2^bits - 1 sorted boundaries lie below the value, by bisection."""
    code = tl.zeros(y.shape, tl.int32)
    for bit in tl.static_range(BITS):
        half = 1 << (BITS - 1 - bit)
        code += tl.where(y > tl.load(table + code + (half - 1)), half, 0)
    return code


@jit
def encode(
    x,
    packed,
    scale,
    offset,
    boundaries,
    n_tokens,
    CHANNELS: constexpr,
    SPAN: constexpr,
    PER_ROW: constexpr,
    GROUP: constexpr,
    BITS: constexpr,
    CENTRE: constexpr,
    BOUNDARY_STRIDE: constexpr,
    TOKENS: constexpr,
    OCTETS: constexpr,
):
    """Codes of `TOKENS` tokens by 8 `OCTETS` channels: 8 codes are `bits` bytes, whatever their width."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    octet = tl.program_id(1) * OCTETS + tl.arange(0, OCTETS)
    t = token[:, None, None]
    channel = octet[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    live = (t < n_tokens) & (channel < CHANNELS)
    value = tl.load(x + t * CHANNELS + channel, mask=live, other=0.0).to(tl.float32)
    cell = t // SPAN * PER_ROW + channel // GROUP
    step = tl.load(scale + cell, mask=live, other=1.0).to(tl.float32)
    origin = -CENTRE * step if offset is None else tl.load(offset + cell, mask=live, other=0.0).to(tl.float32)
    y = tl.div_rn(value - origin, step)
    if boundaries is None:
        code = codes_of_steps(y, BITS, CENTRE)
    else:
        code = codes_of_boundaries(y, boundaries + tl.where(live, channel, 0) * BOUNDARY_STRIDE, BITS)
    code = tl.where(live, code, 0).to(tl.int64 if BITS > 4 else tl.int32)
    word = tl.sum(code << (tl.arange(0, 8) * BITS)[None, None, :].to(code.dtype), axis=2)
    ROW_BYTES: tl.constexpr = (CHANNELS * BITS + 7) // 8
    for n in tl.static_range(BITS):
        byte = octet[None, :] * BITS + n
        live_byte = (token[:, None] < n_tokens) & (byte < ROW_BYTES)
        tl.store(packed + token[:, None] * ROW_BYTES + byte, ((word >> (8 * n)) & 255).to(tl.uint8), mask=live_byte)
