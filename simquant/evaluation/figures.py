"""Means over targets with clustered standard errors: targets of a window are correlated, windows nearly independent."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from simquant.evaluation.scoring import Scores

Normalization = Literal["targets", "gptq"]


def clustered_mean(
    clusters: Sequence[Float64[Tensor, "_"]] | Float64[Tensor, "clusters targets"],
) -> tuple[float, float]:
    """Mean over all targets, and its standard error clustered by window (nan for one cluster).

    Parameters
    ----------
    clusters : sequence of Float64[Tensor, "targets"]
        Values of the targets of each cluster; clusters may differ in size.
    """
    sums = torch.stack([cluster.sum() for cluster in clusters])
    return mean_of_sums(sums, torch.tensor([len(cluster) for cluster in clusters]))


def mean_of_sums(sums: Float64[Tensor, " clusters"], counts: Int64[Tensor, " clusters"]) -> tuple[float, float]:
    """Mean and clustered standard error from the sum and the number of targets of each cluster.

    References
    ----------
    Taylor linearisation for cluster samples: Cochran, Sampling Techniques (1977), section 9A.
    """
    # The mean is a ratio of two sums over clusters, S / n. To first order its error is the mean over clusters of the
    # residuals S_c - n_c * mean, which are independent even if targets of one cluster are not:
    # stderr = sqrt(C / (C - 1) * sum_c (S_c - n_c * mean)^2) / n.
    n_clusters, n_targets = len(sums), int(counts.sum())
    mean = float(sums.sum()) / n_targets
    if n_clusters < 2:
        return mean, math.nan
    squares = float((sums - mean * counts).square().sum())
    return mean, math.sqrt(squares * n_clusters / (n_clusters - 1)) / n_targets


def error_text(stderr: float | None, form: str) -> str:
    """Standard error for tables; 'n/a' for a single window.

    Examples
    --------
    >>> error_text(0.0123, ".3f"), error_text(math.nan, ".3f")
    ('0.012', 'n/a')
    """
    return format(stderr, form) if stderr is not None and math.isfinite(stderr) else "n/a"


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values, and its standard error (nan for one value).

    Examples
    --------
    >>> mean_and_stderr([0.0, 1.0, 1.0, 0.0])
    (0.5, 0.2886...)
    """
    sums = torch.tensor(values, dtype=torch.float64)
    return mean_of_sums(sums, torch.ones(len(values), dtype=torch.int64))


def clustered_rms(clusters: Sequence[Float64[Tensor, "_"]]) -> tuple[float, float]:
    """Root mean square over all targets, and its standard error to first order (0 where all are zero)."""
    mean, stderr = clustered_mean([cluster.square() for cluster in clusters])
    rms = math.sqrt(mean)  # delta method: the error of sqrt(m) is that of m times 1 / (2 sqrt(m))
    return rms, stderr / (2 * rms) if rms else stderr


def perplexity_of(
    clusters: Sequence[Float64[Tensor, "_"]], normalization: Normalization = "targets"
) -> tuple[float, float]:
    """Perplexity, exp of the mean negative log-likelihood, and its standard error to first order.

    Parameters
    ----------
    clusters : sequence of Float64[Tensor, "targets"]
        Negative log-likelihoods of the targets of each cluster.
    normalization : {'targets', 'gptq'}
        Mean over all targets, or mean of the clusters' means; equal for clusters of equal size.
    """
    mean, stderr = clustered_mean(clusters)
    if normalization == "gptq":
        mean = float(torch.stack([cluster.mean() for cluster in clusters]).mean())
    perplexity = float(torch.tensor(mean, dtype=torch.float64).exp())  # inf on overflow, where math.exp raises
    return perplexity, perplexity * stderr


def figures(clusters: Sequence[Scores], normalization: Normalization = "targets") -> dict[str, float]:
    """Figures of `EvalResult` that are computed from scores, by name.

    Parameters
    ----------
    clusters : sequence of Scores
        Scores of independent units, as a rule windows.
    normalization : {'targets', 'gptq'}
        See `perplexity_of`.
    """
    kl = torch.cat([scores.kl for scores in clusters])
    delta_p = [scores.delta_p for scores in clusters]
    pairs = {
        "fp_perplexity": perplexity_of([scores.fp_nll for scores in clusters], normalization),
        "perplexity": perplexity_of([scores.nll for scores in clusters], normalization),
        "loss_nats": clustered_mean([scores.loss for scores in clusters]),
        "kl_mean": clustered_mean([scores.kl for scores in clusters]),
        "top1_flips": clustered_mean([(~scores.agrees).double() for scores in clusters]),
        "delta_p_mean": clustered_mean(delta_p),
        "delta_p_rms": clustered_rms(delta_p),
    }
    return {
        **{name: value for name, (value, _) in pairs.items()},
        **{f"{name}_stderr": stderr for name, (_, stderr) in pairs.items()},
        "kl_p99": _percentile(kl, 0.99),
        "kl_p999": _percentile(kl, 0.999),
        "top1_agreement": float(torch.cat([scores.agrees for scores in clusters]).double().mean()),
    }


def _percentile(values: Float64[Tensor, " targets"], share: float) -> float:
    """Percentile that is one of the values, and so is defined for infinite ones too."""
    return float(np.quantile(values.numpy(), share, method="higher"))
