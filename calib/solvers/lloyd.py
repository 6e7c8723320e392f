"""Weighted k-means on a line by scikit-learn, with the settings of KVQuant's released code.

Lloyd iterations from a random start end in a local optimum. `kmeans_1d` finds the global one; this solver replays what
was published, and is what tests and benchmarks compare with.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

_MOST_ITERATIONS, _TOLERANCE = 50, 1e-4
"""KVQuant's `max_iter`, and scikit-learn's own `tol`: it stops at a squared shift of all levels, in variances."""


def kmeans_lloyd(
    centers: Float[Tensor, "problems bins"],
    weights: Float[Tensor, "problems bins"],
    n_levels: int,
    *,
    random_state: int = 0,
    n_starts: int = 1,
) -> Float64[Tensor, "problems n_levels"]:
    """Levels, ascending, at which scikit-learn's ``KMeans`` stops.

    Parameters
    ----------
    centers
        Values ``x``, in any order; they are fitted in their own precision.
    weights
        Weights ``w >= 0``; bins of weight zero are ignored. Every problem needs a positive one.
    n_levels
        Number of levels. With fewer bins of positive weight, those are the first levels and the last one repeats.
    random_state
        Seed of the k-means++ start; KVQuant's is 0.
    n_starts
        Runs, of which the best counts; KVQuant's ``n_init='auto'`` is one.

    Notes
    -----
    On single values with equal weights this is KVQuant's call, ``KMeans(n_levels, random_state=0, n_init='auto',
    max_iter=50)``. The rule to stop is in units of the weighted variance, so that it does not depend on how values
    fall into bins; scikit-learn's own is in units of the variance without weights.

    Examples
    --------
    >>> kmeans_lloyd(torch.tensor([[9.0, 0.0, 1.0, 10.0]]), torch.tensor([[1.0, 1.0, 3.0, 1.0]]), 2)
    tensor([[0.7500, 9.5000]], dtype=torch.float64)
    """
    found = np.empty((len(centers), n_levels))
    for row, x, w in zip(found, centers.cpu().numpy(), weights.cpu().numpy(), strict=True):
        row[:] = _levels(x[w > 0], w[w > 0], n_levels, random_state, n_starts)
    return torch.from_numpy(found).to(centers.device)


def _levels(
    x: Float[np.ndarray, " bins"], w: Float[np.ndarray, " bins"], n_levels: int, random_state: int, n_starts: int
) -> Float[np.ndarray, " levels"]:
    from sklearn.cluster import KMeans  # takes a second to import, and few runs need it

    if len(x) <= n_levels:
        return np.pad(np.sort(x), (0, n_levels - len(x)), mode="edge")
    variance = float(np.average((x - np.average(x, weights=w)) ** 2, weights=w))
    tolerance = _TOLERANCE * variance / max(float(x.var()), np.finfo(x.dtype).tiny)
    solver = KMeans(n_levels, random_state=random_state, n_init=n_starts, max_iter=_MOST_ITERATIONS, tol=tolerance)
    levels: Float[np.ndarray, " levels"] = np.sort(solver.fit(x[:, None], sample_weight=w).cluster_centers_[:, 0])
    return levels
