# mypy: ignore-errors
"""Triton programs of decode attention: one query token over packed keys and values.

A program takes one split of the tokens of one KV head, with all query heads that share it, and leaves an unnormalized
sum, its largest score and its weight, which the caller joins. Scores are in units of log 2. Tiles of tokens stand first
in both products, so that codes go from memory to the tensor cores through registers only.
"""

from simquant.kernels.language import constexpr, jit, tl
from simquant.kernels.unpacking_programs import channel_order, load_scale, load_steps, load_values


@jit
def product(a, b, DTYPE: constexpr):
    """a @ b, summed in float32."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")


@jit
def load_query(q, heads, channel, factor, HEAD_DIM: constexpr, GROUP: constexpr):
    """The queries of a group of heads, "channels heads", those beyond `GROUP` zero."""
    head = tl.arange(0, heads.shape[0])
    at = q + heads[None, :] * HEAD_DIM + channel[:, None]
    return tl.load(at, mask=(head < GROUP)[None, :], other=0.0).to(tl.float32) * factor


@jit
def fold(query, side, row, channel):
    """Queries times the scale of each channel, at most 1; the factor taken out; and the scores of the offsets."""
    scale, offset = load_scale(side, row, channel, channel >= 0)
    folded = query * scale[:, None]
    unit = tl.maximum(tl.max(tl.abs(folded), axis=0), 1e-30)
    return folded / unit[None, :], unit, tl.sum(query * offset[:, None], axis=0)


@jit
def weigh(score, live, peak, total):
    """Weights of a block of scores, and the running maximum, sum and factor for what was summed before."""
    score = tl.where(live[:, None], score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=0))
    weight, factor = tl.exp2(score - new_peak[None, :]), tl.exp2(peak - new_peak)
    return weight, factor, new_peak, total * factor + tl.sum(weight, axis=0)


@jit
def rotated(keys, row, live, first, cosine, sine, CHANNELS: constexpr, HEAD_DIM: constexpr):
    """Both halves of a head's keys after the rotary embedding, in float32."""
    HALF: tl.constexpr = HEAD_DIM // 2
    a = load_values(keys, row, live, first, CHANNELS, HALF)
    b = load_values(keys, row, live, first + HALF, CHANNELS, HALF)
    at = row[:, None] * HEAD_DIM + channel_order(keys.bits, HALF)[None, :]
    cos = tl.load(cosine + at, mask=live[:, None], other=0.0).to(tl.float32)
    sin = tl.load(sine + at, mask=live[:, None], other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@jit
def narrow(x, DTYPE: constexpr):
    """Values as they are multiplied; the last step of a range can lie beyond what float16 holds."""
    return (tl.clamp(x, -65504.0, 65504.0) if tl.float16 == DTYPE else x).to(DTYPE)


@jit
def prepare(q, keys, heads, first, factor, geometry):
    """Parts of `scores` that depend on the queries alone, once for all blocks of keys."""
    HEAD_DIM: tl.constexpr = geometry.head_dim
    GROUP: tl.constexpr = geometry.group
    if geometry.key_fold == "rotated":
        channel = channel_order(keys.bits, HEAD_DIM // 2)
        low = load_query(q, heads, channel, factor, HEAD_DIM, GROUP)
        return low, load_query(q, heads, channel + HEAD_DIM // 2, factor, HEAD_DIM, GROUP)
    else:
        channel = channel_order(keys.bits, HEAD_DIM)
        query = load_query(q, heads, channel, factor, HEAD_DIM, GROUP)
        if geometry.key_fold == "static":
            return fold(query, keys, 0, first + channel)
        else:
            return query, tl.sum(query, axis=0)


@jit
def scores(queries, keys, row, live, first, cosine, sine, geometry):
    """Products of a block of keys with the queries, "tokens heads"."""
    TYPE: tl.constexpr = geometry.value_type
    if geometry.key_fold == "rotated":
        low, high = rotated(keys, row, live, first, cosine, sine, geometry.channels, geometry.head_dim)
        return product(narrow(low, TYPE), queries[0], TYPE) + product(narrow(high, TYPE), queries[1], TYPE)
    elif geometry.key_fold == "none":
        value = load_values(keys, row, live, first, geometry.channels, geometry.head_dim)
        return product(narrow(value, TYPE), queries[0], TYPE)
    else:
        steps = load_steps(keys, row, live, first, geometry.channels, geometry.head_dim)
        return step_scores(steps, queries, keys, row, live, first, geometry)


@jit
def step_scores(steps, queries, keys, row, live, first, geometry):
    """`scores` of steps whose scales are folded into queries or scores."""
    if geometry.key_fold == "token":
        scale, offset = load_scale(keys, row, first, live)
        score = product(steps, queries[0], geometry.step_type)
        return score * scale[:, None] + offset[:, None] * queries[1][None, :]
    elif geometry.key_fold == "static":
        return product(steps, queries[0], geometry.step_type) * queries[1][None, :] + queries[2][None, :]
    else:
        channel = first + channel_order(keys.bits, geometry.head_dim)
        folded, unit, constant = fold(queries[0], keys, tl.min(row, axis=0), channel)
        return product(steps, folded, geometry.step_type) * unit[None, :] + constant[None, :]


@jit
def weighted_sum(weight, values, row, live, first, geometry):
    """Sum of a block of values, "channels heads", channels in their order."""
    TYPE: tl.constexpr = geometry.value_type
    if geometry.value_fold == "none":
        value = load_values(values, row, live, first, geometry.channels, geometry.head_dim)
        return product(tl.trans(narrow(value, TYPE)), weight, TYPE)
    else:
        steps = load_steps(values, row, live, first, geometry.channels, geometry.head_dim)
        return step_sum(tl.trans(steps), weight, values, row, live, first, geometry)


@jit
def step_sum(steps, weight, values, row, live, first, geometry):
    """`weighted_sum` of steps whose scales are folded into weights or sums."""
    if geometry.value_fold == "token":
        scale, offset = load_scale(values, row, first, live)
        largest = tl.maximum(tl.max(scale, axis=0), 1e-30)  # taken out, so that the weights stay within float16
        summed = product(steps, weight * (scale / largest)[:, None], geometry.step_type) * largest
        return summed + tl.sum(weight * offset[:, None], axis=0)[None, :]
    else:
        channel = first + channel_order(values.bits, geometry.head_dim)
        scale, offset = load_scale(values, tl.min(row, axis=0), channel, channel >= 0)
        summed = product(steps, weight, geometry.step_type) * scale[:, None]
        return summed + offset[:, None] * tl.sum(weight, axis=0)[None, :]


@jit
def store_partial(partial, kv_head, split, acc, peak, total, channel, HEAD_DIM: constexpr, GROUP: constexpr):
    """Leaves the sums of one split, its largest scores and its weights."""
    head = tl.arange(0, peak.shape[0])
    slot = (kv_head * GROUP + head) * partial.n_splits + split
    real = head < GROUP
    tl.store(partial.acc + slot[None, :] * HEAD_DIM + channel[:, None], acc, mask=real[None, :])
    tl.store(partial.peak + slot, peak, mask=real)
    tl.store(partial.total + slot, total, mask=real)


@jit
def packed_split(q, keys, values, cosine, sine, partial, first_split, factor, n_tokens, split_tokens, geometry):
    """One split of a block of packed keys and values.

    `key_fold` and `value_fold` say where scales go: "static" and "span" (one for a channel, for ever or within a
    tile) into the query or onto the sum, "token" (one for a token's head) onto the score or into the weight, "none"
    onto each value, as also where keys are "rotated" here.
    """
    HEAD_DIM: tl.constexpr = geometry.head_dim
    GROUP: tl.constexpr = geometry.group
    TILE: tl.constexpr = geometry.group_tile
    BLOCK: tl.constexpr = geometry.block
    split, kv_head = tl.program_id(0), tl.program_id(1)
    first = kv_head * HEAD_DIM
    heads = kv_head * GROUP + tl.arange(0, TILE)
    stop = tl.minimum((split + 1) * split_tokens, n_tokens)
    queries = prepare(q, keys, heads, first, factor, geometry)
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((HEAD_DIM, TILE), tl.float32)
    for block in range(split * split_tokens, stop, BLOCK):
        row = block + tl.arange(0, BLOCK).to(tl.int64)
        live = row < stop
        score = scores(queries, keys, row, live, first, cosine, sine, geometry)
        weight, shrink, peak, total = weigh(score, live, peak, total)
        acc = acc * shrink[None, :] + weighted_sum(weight, values, row, live, first, geometry)
    channel = channel_order(values.bits, HEAD_DIM)
    store_partial(partial, kv_head, first_split + split, acc, peak, total, channel, HEAD_DIM, GROUP)
