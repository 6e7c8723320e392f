"""Estimator of an eigenbasis (KLT): uncorrelated components with equal weights of their errors."""

from dataclasses import replace
from typing import Literal, final

import torch
from jaxtyping import Float64
from pydantic import Field, model_validator
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.rotated import Rotated
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

_FLOOR = 1e-6
"""Least eigenvalue of a metric, relative to their mean, so that the basis is invertible."""


@final
class RotatedEstimator(WrappingEstimator):
    """Weighted Karhunen-Loeve transform z = x M, with M = G^(1/2) U.

    The metric G gives the cost e^T G e of an error e; the columns of U are the eigenvectors of the covariance of
    x G^(1/2). The components of z are uncorrelated, and the squared error of z is the cost of the error of x.

    Parameters
    ----------
    metric : {'none', 'query', 'fisher'}
        G: the identity; the mean squared error of the logits of the queries of a key
        (`calib.statistics.readers.logit_metric`); or the second moments E[g g^T] of the loss gradients, mixed with a
        fraction of the query metric.
    tokens : {'alike', 'score', 'queries'}
        Covariance of all tokens with equal weights; for values, weighted by the expected squared logit of their keys;
        or, for keys, of their queries (arXiv 2605.17757).
    scope : {'head', 'layer'}
        One basis per head, or one for all heads, which needs statistics of the tier `full`.
    query_share : float
        Fraction of the query metric in the metric 'fisher', after scaling to equal traces: few tokens dominate the
        gradients.
    """

    method: Literal["rotated"] = "rotated"
    metric: Literal["none", "query", "fisher"] = "none"
    tokens: Literal["alike", "score", "queries"] = "alike"
    scope: Literal["head", "layer"] = "head"
    query_share: float = Field(default=0.3, ge=0, le=1)

    @model_validator(mode="after")
    def _possible(self) -> "RotatedEstimator":
        if self.tokens == "queries" and self.scope == "layer":
            raise InvalidValueError("queries read one head each; with tokens: queries use scope: head")
        return self

    @property
    def needs_fisher(self) -> bool:
        """True if the metric or the inner fit needs squared gradients."""
        return self.metric == "fisher" or self.inner.needs_fisher

    @property
    def needs_full(self) -> bool:
        """True for a basis of the whole layer, or if the inner fit needs the tier `full`."""
        return self.scope == "layer" or self.inner.needs_full

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Basis from second moments, with the inner fit on the rotated reservoir."""
        # |e M|^2 = e G^(1/2) U U^T G^(1/2) e^T = e G e^T for any orthogonal U; of these the eigenvectors of the
        # weighted covariance G^(1/2) C G^(1/2) have the largest coding gain (Gersho and Gray, chapter 8).
        metric, covariance = self._metric(statistics), self._covariance(statistics)
        root = _root(metric) if self.scope == "head" else self._layer_root(metric, statistics)
        basis = (root @ _eigenvectors(root @ covariance @ root)).float()
        channels = statistics.shape.channels
        rotated = Rotated(channels=channels, inner=Identity(channels=channels), basis=basis)
        inner = self.fit_inner(statistics.mapped(rotated.transform(statistics.rows)))
        return replace(inner, quantizer=rotated.wrapping(inner.quantizer))

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Raises ValueError: bases are fitted."""
        raise InvalidValueError("a basis is fitted; calibrate first, or use method: hadamard")

    def _metric(self, statistics: SiteStatistics) -> Float64[Tensor, "heads head_dim head_dim"]:
        shape = statistics.shape
        if self.metric == "none":
            return torch.eye(shape.head_dim, dtype=torch.float64).expand(shape.heads, -1, -1)
        if self.metric == "query":
            return _query_metric(statistics)
        fisher = statistics.gradient_moments.second().cpu()
        if self.query_share == 0 or statistics.query_metric is None:
            return fisher
        query = _query_metric(statistics)
        # Equal traces make both metrics count alike, whatever their units; the mixture keeps the trace of Fisher's.
        traces = [metric.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] for metric in (fisher, query)]
        return (1 - self.query_share) * fisher + self.query_share * query * (traces[0] / traces[1].clamp_min(1e-300))

    def _layer_root(
        self, metric: Float64[Tensor, "heads head_dim head_dim"], statistics: SiteStatistics
    ) -> Float64[Tensor, "1 channels channels"]:
        """Square root of the metric of a whole layer, with correlations between heads from reservoir gradients.

        These are few tokens, so half of the metric remains block-diagonal, from the gradients of all tokens.
        """
        if self.metric != "fisher":
            root: Tensor = torch.block_diag(*_root(metric))
            return root[None]
        # Errors of several heads add up in the loss: E[g g^T] over all channels has blocks off the diagonal, which only
        # the gradients of the reservoir have.
        gradients, of_heads = statistics.row_gradients.double(), torch.block_diag(*metric)
        sampled = gradients.mT @ gradients
        return _root((of_heads + sampled * (of_heads.trace() / sampled.trace().clamp_min(1e-300)))[None] / 2)

    def _covariance(self, statistics: SiteStatistics) -> Float64[Tensor, "groups width width"]:
        if self.tokens == "score":
            return self._weighted_covariance(statistics)
        if self.tokens == "queries":
            return _query_metric(statistics)
        moments = statistics.layer_moments if self.scope == "layer" else statistics.moments
        mean = moments.mean().cpu().view(moments.groups, -1)
        return moments.second().cpu() - mean[:, :, None] * mean[:, None, :]

    def _weighted_covariance(self, statistics: SiteStatistics) -> Float64[Tensor, "groups width width"]:
        if statistics.token_weights is None:
            raise InvalidValueError(f"{statistics.shape.site}: tokens: score is for values only; use tokens: alike")
        groups = 1 if self.scope == "layer" else statistics.shape.heads
        # C_V = sum_t w_t (v_t - m)(v_t - m)^T with w_t = k_t^T C_K k_t normalised (OSCAR, arXiv 2605.17757).
        weights = statistics.token_weights.double() / statistics.token_weights.double().sum()
        rows = statistics.rows.double()
        centred: Tensor = (rows - weights @ rows).unflatten(1, (groups, -1)).transpose(0, 1)
        return centred.mT @ (weights[:, None] * centred)


def _query_metric(statistics: SiteStatistics) -> Float64[Tensor, "heads head_dim head_dim"]:
    if statistics.query_metric is None:
        raise InvalidValueError(
            f"{statistics.shape.site}: a query metric is for keys only; use metric: none for values"
        )
    return statistics.query_metric


def _root(metric: Float64[Tensor, "heads head_dim head_dim"]) -> Float64[Tensor, "heads head_dim head_dim"]:
    """Symmetric square root, with eigenvalues of at least a small fraction of their mean."""
    # G = V diag(l) V^T gives G^(1/2) = V diag(sqrt l) V^T. The floor bounds the condition number of M by sqrt(width /
    # floor); a metric of zeros becomes the identity.
    values, vectors = torch.linalg.eigh(metric)
    floor = (_FLOOR * values.mean(dim=1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
    values = torch.where(values.sum(dim=1, keepdim=True) > 0, values.maximum(floor), 1.0)
    root: Tensor = vectors * values.sqrt()[:, None, :] @ vectors.mT
    return root


def _eigenvectors(covariance: Float64[Tensor, "groups width width"]) -> Float64[Tensor, "groups width width"]:
    """Eigenvectors as columns, by descending eigenvalue; the largest entry of each is positive, for a unique sign."""
    vectors: Tensor = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * largest.sign()
