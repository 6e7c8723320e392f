"""Choice of the number of sink tokens, from the statistics of the first positions."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from artifacts.manifest import SinkChoice
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.sites import Site
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.readers import log_attention
from calib.statistics.site_statistics import FIRST_POSITIONS

_CONTEXT_TOKENS = 2048
"""Length of the sequence over which full-precision tokens are spread."""

_EXACT_BITS = 16


def choose_sinks(statistics: ModelStatistics, quantizers: Mapping[Site, Quantizer]) -> tuple[int, SinkChoice]:
    """Number of first tokens with the least weighted error per counted bit, at most 8, and its grounds.

    The key of an attention sink is far away from all others, and most queries read it, so that a quantizer of the
    others serves it badly. Errors of keys are those of logits; those of keys and values are weighted by the attention
    that a token can expect, and at each site relative to the variance of ordinary tokens. Tokens that `ExactSinks`
    keeps count as quantized: its threshold is fitted to first tokens that are left out, and goes with them.

    Parameters
    ----------
    statistics : ModelStatistics
        Statistics of the model.
    quantizers : Mapping[Site, Quantizer]
        Quantizers of all cached sites, fitted without the first 8 positions.
    """
    coded = {site: own.inner if isinstance(own, ExactSinks) else own for site, own in quantizers.items()}
    token_errors, token_bits = _measured(statistics, coded)
    # Means over T tokens with the first n exact: errors D(n) = (sum of e_p over p from n to 7, + (T - 8) e_rest) / T,
    # and bits B(n) likewise, + 16 n / T. Entropy coders spend on a sink, as an escape, what others lose on it.
    numbers = range(most_sinks(statistics) + 1)
    errors = [_stored(_mean_from(n, token_errors)) for n in numbers]
    bits = [_stored(_mean_from(n, token_bits) + n * _EXACT_BITS / _CONTEXT_TOKENS) for n in numbers]
    # At high resolution D falls as 2^(-2 B), 6.02 dB a bit (Bennett 1948): along that line B + log2(D) / 2 is constant,
    # and where it is less, exact tokens save more error than their bits would in all codes. The first minimum counts.
    costs = [b + math.log2(d) / 2 if d else -math.inf for d, b in zip(errors, bits, strict=True)]
    number = costs.index(min(costs))
    return number, SinkChoice(reason=_reason(number, costs, errors, bits), errors=errors, bits=bits)


def most_sinks(statistics: ModelStatistics) -> int:
    """Largest number of sink tokens that a cache of the model takes: at most 8, and fewer than a sliding window."""
    windows: Sequence[int | None] = statistics.origin.model.get("sliding_window") or ()
    return min([FIRST_POSITIONS, *(window - 1 for window in windows if window)])


def _mean_from(n: int, by_position: Float64[Tensor, " positions"]) -> float:
    """Mean over a sequence of which the first n tokens count nothing; the last entry is of all later positions."""
    first, later = by_position[n:FIRST_POSITIONS].sum(), by_position[FIRST_POSITIONS]
    return float(first + (_CONTEXT_TOKENS - FIRST_POSITIONS) * later) / _CONTEXT_TOKENS


def _stored(figure: float) -> float:
    # Six digits: those beyond depend on the order of sums, and merged shards give the bytes of the whole.
    return float(f"{figure:.6g}")


def _reason(number: int, costs: Sequence[float], errors: Sequence[float], bits: Sequence[float]) -> str:
    if len(costs) == 1 or not errors[0]:
        return f"{number} of at most {len(costs) - 1}: there is no error to cut"
    told = number or min(range(1, len(costs)), key=lambda n: costs[n])
    cut, spent = 1 - errors[told] / errors[0], bits[told] - bits[0]
    tokens = "exact first token" if told == 1 else f"{told} exact first tokens"
    verb = ("cuts" if told == 1 else "cut") if number else "would cut"
    return (
        f"{number} of at most {len(costs) - 1}: {tokens} {verb} the weighted error by {cut:.1%} for {spent:.3f} bits, "
        f"which cut it by {1 - 4**-spent:.1%} elsewhere"
    )


def _measured(
    statistics: ModelStatistics, quantizers: Mapping[Site, Quantizer]
) -> tuple[Float64[Tensor, " positions"], Float64[Tensor, " positions"]]:
    """Relative squared error at positions 0 to 7 and at all later ones, mean over sites; and mean bits per value."""
    positions = _rows(statistics, statistics.sample.positions, statistics.first.positions)
    ordinary = positions >= FIRST_POSITIONS
    errors, bits = torch.zeros(2, FIRST_POSITIONS + 1, dtype=torch.float64)
    attention = {layer: _attention(statistics, layer) for layer in {site.layer for site in quantizers}}
    for site, x, context, decoded in _simulated(statistics, quantizers):
        quantizer = quantizers[site]
        spread, squared = _weighed(statistics, site, attention[site.layer], [x - x[ordinary].mean(dim=0), x - decoded])
        variance = float(spread[ordinary].mean())
        errors += _by_position(squared, positions) / variance if variance else 0.0
        bits += _bits_by_position(quantizer, x, context, positions)
    return errors / len(quantizers), bits / sum(quantizer.channels for quantizer in quantizers.values())


def _bits_by_position(
    quantizer: Quantizer, x: Float32[Tensor, "rows channels"], context: Context, positions: Int64[Tensor, " rows"]
) -> Float64[Tensor, " positions"]:
    """Mean bits of a token at positions 0 to 7 and at all later ones, like `_by_position`."""

    def bits(chosen: Bool[Tensor, " rows"]) -> float:
        # In the dtype of a model that runs in 16 bits, in which tokens and outliers are counted.
        codes = quantizer.encode(x[chosen].bfloat16(), tuple(u[chosen] for u in context))
        return 8 * codes.nbytes / int(chosen.sum())

    later = bits(positions >= FIRST_POSITIONS)
    places = [positions == p for p in range(FIRST_POSITIONS)]
    return torch.tensor([*(bits(at) if at.any() else later for at in places), later], dtype=torch.float64)


def _simulated(
    statistics: ModelStatistics, quantizers: Mapping[Site, Quantizer]
) -> Iterator[tuple[Site, Float32[Tensor, "rows channels"], Context, Float32[Tensor, "rows channels"]]]:
    """Sites in the order of prediction, with their tokens, the context, and the tokens after decoding."""
    decoded: dict[Site, Tensor] = {}
    order = sorted(quantizers)
    for number, site in enumerate(order):
        own = statistics.sites[site]
        x, context = _rows(statistics, own.rows, own.first_rows), tuple(decoded[s] for s in quantizers[site].sources)
        decoded[site] = quantizers[site].simulate(x, context)
        yield site, x, context, decoded[site]
        read = {source for later in order[number + 1 :] for source in quantizers[later].sources}
        decoded = {name: rows for name, rows in decoded.items() if name in read}


def _weighed(
    statistics: ModelStatistics,
    site: Site,
    attention: Float64[Tensor, "rows kv_heads"] | None,
    differences: Sequence[Float32[Tensor, "rows channels"]],
) -> list[Float64[Tensor, " rows"]]:
    """Squares of differences at each token, weighted by its expected attention; those of keys are of logits."""
    heads = [rows.double().unflatten(1, (statistics.sites[site].shape.heads, -1)) for rows in differences]
    if attention is None:
        return [x.square().sum(dim=(1, 2)) for x in heads]
    metric = statistics.site(site, FIRST_POSITIONS).query_metric  # None for values
    moved = heads if metric is None else [(x.transpose(0, 1) @ metric).transpose(0, 1) for x in heads]
    # e^T G e, head by head.
    return [(attention * (g * x).sum(dim=2)).sum(dim=1) for g, x in zip(moved, heads, strict=True)]


def _attention(statistics: ModelStatistics, layer: int) -> Float64[Tensor, "rows kv_heads"] | None:
    """Expected attention to each token, in units of that to an ordinary one; None without queries."""
    sites = {site.tensor: own for site, own in statistics.sites.items() if site.layer == layer}
    if not {"key", "query"} <= sites.keys():
        return None
    own, queries = sites["key"], sites["query"].from_position(FIRST_POSITIONS, statistics.sample, statistics.first)
    rows = _rows(statistics, own.rows, own.first_rows)
    logits = log_attention(own.shape, rows, queries, statistics.seqlen)
    n_ordinary = int((statistics.sample.positions >= FIRST_POSITIONS).sum())
    relative = (logits - logits[:n_ordinary].logsumexp(dim=0) + math.log(n_ordinary)).exp()
    # A query sees T / 2 tokens on average. A sink of r times the ordinary share takes r / (r + T / 2) of the attention.
    seen = _CONTEXT_TOKENS / 2
    weights: Tensor = (seen / (1 + seen / relative)).mean(dim=2)
    return weights


def _rows(statistics: ModelStatistics, sampled: Tensor, first: Tensor) -> Tensor:
    """Entries of the reservoir from position 8 on, then those of the sample of first positions."""
    return torch.cat([sampled[statistics.sample.positions >= FIRST_POSITIONS], first])


def _by_position(squared: Float64[Tensor, " rows"], positions: Int64[Tensor, " rows"]) -> Float64[Tensor, " positions"]:
    """Means at positions 0 to 7 and over all later ones; a position without a token counts as a later one."""
    place = positions.clamp_max(FIRST_POSITIONS)
    n_tokens = place.bincount(minlength=FIRST_POSITIONS + 1)
    means = torch.zeros(len(n_tokens), dtype=torch.float64).index_add_(0, place, squared) / n_tokens
    return torch.where(n_tokens > 0, means, means[FIRST_POSITIONS])
