"""What reads a site: how much an error there matters to attention, in first order."""

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from calib.statistics.pair_norms import rotary_pairs
from calib.statistics.site_statistics import SiteShape, SiteStatistics


def query_moment(key: SiteShape, query: SiteStatistics) -> Float64[Tensor, "kv_heads head_dim head_dim"]:
    """E[q q^T] of the queries that read each key head: an error e of a key moves their logits by e^T E[q q^T] e.

    References
    ----------
    arXiv:2605.17757 (C_K).
    """
    per_query_head: Tensor = query.moments.second().cpu().unflatten(0, (key.heads, -1))
    return per_query_head.mean(dim=1)


def query_energy(key: SiteShape, moment: Float64[Tensor, "kv_heads head_dim head_dim"]) -> Float64[Tensor, " channels"]:
    """Weight of an error in each key channel: E[q^2] of the queries that read it, alike for both of a rotary pair.

    Averaged over relative positions, the squared error of a logit is the sum over pairs of E|q_pair|^2 / 2 times the
    pair's squared key error.
    """
    energy = moment.diagonal(dim1=1, dim2=2).reshape(-1).clone()
    if key.rotary_dim:
        first, second = rotary_pairs(key.heads, key.head_dim, key.rotary_dim, interleaved=key.interleaved)
        energy[first] = energy[second] = (energy[first] + energy[second]) / 2
    return energy


def logit_metric(
    key: SiteShape, moment: Float64[Tensor, "kv_heads head_dim head_dim"], context_tokens: int
) -> Float64[Tensor, "kv_heads head_dim head_dim"]:
    """G for which an error e of a key costs e^T G e: the mean squared error of the logits of all queries that see it.

    Keys before rotation meet queries turned by their distance D, so G = E[R_D q q^T R_D^T] over the distances within a
    context, shorter ones occurring more often. Fast pairs lose their phases in that mean, slow ones keep them. For
    keys after rotation it is the moment itself.

    Parameters
    ----------
    key : SiteShape
        Of the keys; its frequencies say how fast each pair turns.
    moment : Float64[Tensor, "kv_heads head_dim head_dim"]
        E[q q^T] of the queries, see `query_moment`.
    context_tokens : int
        Length of the context, from 1.
    """
    if not key.frequencies or key.site.stage == "post_rope":
        return moment
    distances = torch.arange(context_tokens, dtype=torch.float64)
    weights = (context_tokens - distances).to(torch.complex128) / float((context_tokens - distances).sum())
    turns = torch.exp(1j * distances[:, None] * torch.tensor(key.frequencies, dtype=torch.float64))
    turns = torch.cat([turns, turns.new_ones(context_tokens, key.head_dim - key.rotary_dim)], dim=1)
    order = _pairs_first(key)
    return _turned(moment[:, order][:, :, order], weights, turns)[:, order.argsort()][:, :, order.argsort()]


def _pairs_first(key: SiteShape) -> Tensor:
    """Channels of a head: first members of the pairs, those that do not turn, second members."""
    first, second = rotary_pairs(1, key.head_dim, key.rotary_dim, interleaved=key.interleaved)
    return torch.cat([first, torch.arange(key.rotary_dim, key.head_dim), second])


def _turned(moment: Tensor, weights: Tensor, turns: Tensor) -> Tensor:
    """Mean of a moment whose pairs are turned as complex numbers z = u + iv, from E[z_i conj(z_j)] and E[z_i z_j]."""
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
    """Weight of an error in each token's value: the expected squared logit of its key, over all heads; mean 1.

    References
    ----------
    arXiv:2605.17757 (w_t = k_t^T C_K k_t, here with the energies of rotary pairs for C_K).
    """
    squared = keys.double().square() @ energy
    mean = squared.mean()
    return (squared / mean if mean > 0 else torch.ones_like(squared)).float()
