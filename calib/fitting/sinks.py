"""Choice of the number of sink tokens, from the statistics of the first positions."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from artifacts.manifest import SinkChoice
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.sites import Site
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.readers import score_weights
from calib.statistics.site_statistics import FIRST_POSITIONS

_CONTEXT_TOKENS = 2048
"""Length of the sequence over which full-precision tokens are spread."""

_EXACT_BITS = 16


def choose_sinks(statistics: ModelStatistics, quantizers: Mapping[Site, Quantizer]) -> tuple[int, SinkChoice]:
    """Number of first tokens with the least weighted error per counted bit, at most 8, and its grounds.

    The key of an attention sink is far away from all others, and most queries read it, so that a quantizer of the
    others serves it badly. Errors of keys are weighted by what queries read, errors of values by the expected squared
    logits of their tokens; at each site they are relative to the variance of ordinary tokens. Tokens that `ExactSinks`
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
    # Mean error of T tokens with the first n exact: D(n) = (sum of e_p over p from n to 7, + (T - 8) e_rest) / T. Mean
    # bits: B(n) = ((T - n) b + 16 n) / T.
    later = (_CONTEXT_TOKENS - FIRST_POSITIONS) * float(token_errors[FIRST_POSITIONS])
    numbers = range(most_sinks(statistics) + 1)
    errors = [_stored((float(token_errors[n:FIRST_POSITIONS].sum()) + later) / _CONTEXT_TOKENS) for n in numbers]
    bits = [_stored(token_bits + n * (_EXACT_BITS - token_bits) / _CONTEXT_TOKENS) for n in numbers]
    # At high resolution D falls as 2^(-2 B), 6.02 dB a bit (Bennett 1948): along that line B + log2(D) / 2 is constant,
    # and where it is less, exact tokens save more error than their bits would in all codes. The first minimum counts.
    costs = [b + math.log2(d) / 2 if d else -math.inf for d, b in zip(errors, bits, strict=True)]
    number = costs.index(min(costs))
    return number, SinkChoice(reason=_reason(number, costs, errors, bits), errors=errors, bits=bits)


def most_sinks(statistics: ModelStatistics) -> int:
    """Largest number of sink tokens that a cache of the model takes: at most 8, and fewer than a sliding window."""
    windows: Sequence[int | None] = statistics.origin.model.get("sliding_window") or ()
    return min([FIRST_POSITIONS, *(window - 1 for window in windows if window)])


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
) -> tuple[Float64[Tensor, " positions"], float]:
    """Relative squared error at positions 0 to 7 and at all later ones, mean over sites; and mean bits per value."""
    positions = _rows(statistics, statistics.sample.positions, statistics.first.positions)
    ordinary = positions >= FIRST_POSITIONS
    errors, bits, channels = torch.zeros(FIRST_POSITIONS + 1, dtype=torch.float64), 0.0, 0
    for site, x, context, decoded in _simulated(statistics, quantizers):
        quantizer = quantizers[site]
        spread, squared = _weighed(statistics, site, [x - x[ordinary].mean(dim=0), x - decoded])
        variance = float(spread[ordinary].mean())
        errors += _by_position(squared, positions) / variance if variance else 0.0
        # In the dtype of a model that runs in 16 bits, in which tokens and outliers are counted.
        codes = quantizer.encode(x[ordinary].bfloat16(), tuple(u[ordinary] for u in context))
        bits += 8 * codes.nbytes / int(ordinary.sum())
        channels += quantizer.channels
    return errors / len(quantizers), bits / channels


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
    statistics: ModelStatistics, site: Site, differences: Sequence[Float32[Tensor, "rows channels"]]
) -> list[Float64[Tensor, " rows"]]:
    """Weighted squares of differences at each token: of logits for keys, times expected squared logits for values."""
    key = next((name for name in statistics.sites if name.layer == site.layer and name.tensor == "key"), None)
    own = None if key is None else statistics.site(key, FIRST_POSITIONS)
    if key is None or own is None or own.query_metric is None or own.query_energy is None:
        return [rows.double().square().sum(dim=1) for rows in differences]
    if site == key:
        # e^T G e, head by head.
        heads = [rows.double().unflatten(1, (own.shape.heads, -1)).transpose(0, 1) for rows in differences]
        return [(e @ own.query_metric * e).sum(dim=(0, 2)) for e in heads]
    keys = _rows(statistics, statistics.sites[key].rows, statistics.sites[key].first_rows)
    weights = score_weights(keys, own.query_energy)
    return [weights * rows.double().square().sum(dim=1) for rows in differences]


def _rows(statistics: ModelStatistics, sampled: Tensor, first: Tensor) -> Tensor:
    """Entries of the reservoir from position 8 on, then those of the sample of first positions."""
    return torch.cat([sampled[statistics.sample.positions >= FIRST_POSITIONS], first])


def _by_position(squared: Float64[Tensor, " rows"], positions: Int64[Tensor, " rows"]) -> Float64[Tensor, " positions"]:
    """Means at positions 0 to 7 and over all later ones; a position without a token counts as a later one."""
    place = positions.clamp_max(FIRST_POSITIONS)
    n_tokens = place.bincount(minlength=FIRST_POSITIONS + 1)
    means = torch.zeros(len(n_tokens), dtype=torch.float64).index_add_(0, place, squared) / n_tokens
    return torch.where(n_tokens > 0, means, means[FIRST_POSITIONS])
