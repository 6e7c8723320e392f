"""Weights of quantization errors in keys and values, from the queries: first-order effect on attention."""

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from calib.statistics.pair_norms import rotary_pairs
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics


def query_moment(key: SiteShape, query: SiteStatistics) -> Float64[Tensor, "kv_heads head_dim head_dim"]:
    """Second moment E[q q^T] of the queries of each key head: E[(q . e)^2] = e^T E[q q^T] e for a key error e.

    References
    ----------
    arXiv:2605.17757 (C_K).
    """
    per_query_head: Tensor = query.moments.second().cpu().unflatten(0, (key.heads, -1))
    return per_query_head.mean(dim=1)


def query_energy(key: SiteShape, moment: Float64[Tensor, "kv_heads head_dim head_dim"]) -> Float64[Tensor, " channels"]:
    """Weight of a squared error in each key channel: E[q^2] of its queries, equal for both channels of a rotary pair.

    Averaged over relative positions, the squared error of a logit is the sum over pairs of E|q_pair|^2 / 2 times the
    squared key error of the pair.
    """
    # One pair: the logit error is q . R e with R a rotation by the angle between the two positions. Over a uniform
    # angle E[(q . R e)^2] = |q|^2 |e|^2 E[cos^2] = |q|^2 |e|^2 / 2.
    energy = moment.diagonal(dim1=1, dim2=2).reshape(-1).clone()
    if key.rotary_dim:
        first, second = rotary_pairs(key.heads, key.head_dim, key.rotary_dim, interleaved=key.interleaved)
        energy[first] = energy[second] = (energy[first] + energy[second]) / 2
    return energy


def logit_metric(
    key: SiteShape, moment: Float64[Tensor, "kv_heads head_dim head_dim"], context_tokens: int
) -> Float64[Tensor, "kv_heads head_dim head_dim"]:
    """Metric G of key errors: e^T G e is the mean squared error of the logits of all queries that attend to the key.

    Keys before RoPE meet queries rotated by their distance D, so G = E[R_D q q^T R_D^T] over the distances within a
    context, shorter ones being more frequent. Fast pairs lose their phase in that mean, slow ones keep it. For keys
    after RoPE it is the second moment itself.

    Parameters
    ----------
    key : SiteShape
        Shape of the keys, with the frequency of each pair.
    moment : Float64[Tensor, "kv_heads head_dim head_dim"]
        E[q q^T] of the queries, see `query_moment`.
    context_tokens : int
        Length of the context, from 1.
    """
    if not key.frequencies or key.site.stage == "post_rope":
        return moment
    order, (weights, turns) = _pairs_first(key), _distances(key, context_tokens)
    return _turned(moment[:, order][:, :, order], weights, turns)[:, order.argsort()][:, :, order.argsort()]


def log_attention(
    key: SiteShape, rows: Float32[Tensor, "rows channels"], query: SiteStatistics, context_tokens: int
) -> Float64[Tensor, "rows kv_heads group"]:
    """Logarithm of the expected attention to each key before normalisation, by each query head of its group.

    Queries count as Gaussian and a logit as q . k / sqrt(head_dim), whatever scale or cap a model has of its own.

    Parameters
    ----------
    key : SiteShape
        Shape of the keys.
    rows : Float32[Tensor, "rows channels"]
        Keys.
    query : SiteStatistics
        Statistics of the queries of the layer.
    context_tokens : int
        Length of the context, from 1.

    References
    ----------
    arXiv:2510.00636 (expected attention).
    """
    # For a logit s that is Gaussian, E[e^s] = exp(E s + Var s / 2). With queries turned by their distance,
    # E s = m . k / sqrt(d) and E s^2 = k^T G k / d, G being the metric of the head and m the mean of R_D q.
    keys = rows.double().unflatten(1, (key.heads, -1))
    means = _mean_turned(key, query.moments.mean().cpu().view(-1, key.head_dim), context_tokens)
    metrics = logit_metric(key, query.moments.second().cpu(), context_tokens)
    means, metrics = (found.unflatten(0, (key.heads, -1)) for found in (means, metrics))
    first = torch.einsum("nhi,hgi->nhg", keys, means) / key.head_dim**0.5
    square = torch.einsum("nhi,hgij,nhj->nhg", keys, metrics, keys) / key.head_dim
    found: Tensor = first + (square - first.square()).clamp_min(0) / 2
    return found


def _mean_turned(
    key: SiteShape, mean: Float64[Tensor, "heads head_dim"], context_tokens: int
) -> Float64[Tensor, "heads head_dim"]:
    """Mean over the distances of a context of a mean query of each head, turned by RoPE."""
    if not key.frequencies or key.site.stage == "post_rope":
        return mean
    order, n = _pairs_first(key), key.rotary_dim // 2
    weights, turns = _distances(key, context_tokens)
    first, rest, second = mean[:, order].split([n, key.head_dim - 2 * n, n], dim=1)
    pairs = torch.complex(first, second) * (weights @ turns)[:n]
    return torch.cat([pairs.real, rest, pairs.imag], dim=1)[:, order.argsort()]


def _distances(key: SiteShape, context_tokens: int) -> tuple[Tensor, Tensor]:
    """Weight of each distance in a context, and the turn of each pair at it as a complex number; 1 without rotation."""
    # A context of T tokens has T - D pairs of positions at distance D. R_m^T R_n depends on m - n alone (RoPE, arXiv
    # 2104.09864, equation 16): q_m^T R_m^T R_n e = (R_D q)^T e with D = m - n.
    distances = torch.arange(context_tokens, dtype=torch.float64)
    weights = (context_tokens - distances).to(torch.complex128) / float((context_tokens - distances).sum())
    turns = torch.exp(1j * distances[:, None] * torch.tensor(key.frequencies, dtype=torch.float64))
    return weights, torch.cat([turns, turns.new_ones(context_tokens, key.head_dim - key.rotary_dim)], dim=1)


def _pairs_first(key: SiteShape) -> Tensor:
    """Channel order of a head: first channels of the pairs, channels without rotation, second channels."""
    first, second = rotary_pairs(1, key.head_dim, key.rotary_dim, interleaved=key.interleaved)
    return torch.cat([first, torch.arange(key.rotary_dim, key.head_dim), second])


def _turned(moment: Tensor, weights: Tensor, turns: Tensor) -> Tensor:
    """Mean over distances of a second moment whose pairs are rotated, as complex numbers z = u + i v."""
    # Rotation multiplies z_j by t_j = e^(i f_j D), so A = E[z_j conj z_k] gets the factors E[t_j conj t_k] and
    # B = E[z_j z_k] the factors E[t_j t_k]. A = uu + vv + i (vu - uv) and B = uu - vv + i (uv + vu) in terms of the
    # second moments, hence uu = Re(A + B) / 2, vv = Re(A - B) / 2 and uv = Im(B - A) / 2 afterwards.
    n = turns.shape[1]
    padded = torch.nn.functional.pad(moment, (0, 2 * n - moment.shape[1], 0, 2 * n - moment.shape[1]))
    uu, uv, vv = padded[:, :n, :n], padded[:, :n, n:], padded[:, n:, n:]
    conjugate = torch.complex(uu + vv, uv.mT - uv) * (turns.mT @ (weights[:, None] * turns.conj()))
    plain = torch.complex(uu - vv, uv.mT + uv) * (turns.mT @ (weights[:, None] * turns))
    mixed = (plain.imag - conjugate.imag) / 2
    rows = torch.cat([(conjugate.real + plain.real) / 2, mixed], dim=2)
    whole = torch.cat([rows, torch.cat([mixed.mT, (conjugate.real - plain.real) / 2], dim=2)], dim=1)
    return whole[:, : moment.shape[1], : moment.shape[2]]


def score_weights(
    keys: Float32[Tensor, "rows channels"], energy: Float64[Tensor, " channels"]
) -> Float32[Tensor, " rows"]:
    """Weight of a squared error in the value of each token: the expected squared logit of its key; mean 1.

    References
    ----------
    arXiv:2605.17757 (w_t = k_t^T C_K k_t, here with the energies of rotary pairs for C_K).
    """
    squared = keys.double().square() @ energy
    mean = squared.mean()
    return (squared / mean if mean > 0 else torch.ones_like(squared)).float()
