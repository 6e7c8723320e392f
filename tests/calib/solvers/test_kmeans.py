"""One-dimensional k-means: against brute force, a naive programme, sklearn and the Gaussian limits; and sklearn's."""

from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from calib.solvers.kmeans import distortion, distortion_by_levels, kmeans_1d
from calib.solvers.lloyd import kmeans_lloyd

pytestmark = pytest.mark.shapes


def random_problems(n_problems: int, n_bins: int, seed: int, empty: float = 0.2) -> tuple[Tensor, Tensor]:
    """Ascending centers with ties, and weights of which a share `empty` is zero."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n_problems, n_bins, generator=generator, dtype=torch.float64)
    centers = torch.where(torch.rand(centers.shape, generator=generator) < 0.5, centers.round(decimals=1), centers)
    weights = torch.rand(centers.shape, generator=generator, dtype=torch.float64)
    weights[torch.rand(centers.shape, generator=generator) < empty] = 0
    weights[:, 0] += 0.1
    return centers.sort(-1).values, weights


def gaussian_histogram(n_bins: int = 4096) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-6, 6, n_bins, dtype=torch.float64)[None]
    density = torch.exp(-x.square() / 2)
    return x, density / density.sum()


def segment_cost(x: Tensor, w: Tensor) -> float:
    return float((w * (x - (w * x).sum() / w.sum()).square()).sum()) if w.sum() > 0 else 0.0


def best_partition(x: Tensor, w: Tensor, n_levels: int) -> float:
    """Least cost over all ways to cut the line into n_levels intervals, some of them empty if bins are few."""
    cuts = combinations(range(1, len(x)), min(n_levels, len(x)) - 1)
    edges = ([0, *cut, len(x)] for cut in cuts)
    return min(sum(segment_cost(x[i:j], w[i:j]) for i, j in pairwise(e)) for e in edges)


def naive_programme(x: Tensor, w: Tensor, n_levels: int) -> float:
    n = len(x)
    cost = [[segment_cost(x[i:j], w[i:j]) for j in range(n + 1)] for i in range(n + 1)]
    best = [0.0] + [float("inf")] * n
    for _ in range(n_levels):
        best = [min(best[i] + cost[i][j] for i in range(j + 1)) for j in range(n + 1)]
    return best[n]


@pytest.mark.parametrize("n_bins", [1, 2, 5, 9])
@pytest.mark.parametrize("n_levels", [1, 2, 3, 4])
def test_equals_brute_force(n_bins: int, n_levels: int) -> None:
    centers, weights = random_problems(12, n_bins, seed=n_bins)
    expected = torch.tensor([best_partition(x, w, n_levels) for x, w in zip(centers, weights, strict=True)])
    levels = kmeans_1d(centers, weights, n_levels)
    torch.testing.assert_close(distortion(centers, weights, levels), expected.double(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("n_bins", "n_levels"), [(63, 5), (64, 8), (65, 16), (130, 7)])
def test_equals_naive_programme(n_bins: int, n_levels: int) -> None:
    centers, weights = random_problems(2, n_bins, seed=n_bins)
    expected = [naive_programme(x, w, n_levels) for x, w in zip(centers, weights, strict=True)]
    found = distortion(centers, weights, kmeans_1d(centers, weights, n_levels))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def dense_programme(x: Tensor, w: Tensor, n_levels: int) -> float:
    """The same without its inner loops, for more bins."""
    sums = torch.stack([w, w * x, w * x.square()]).double().cumsum(-1)
    sums = torch.cat([torch.zeros(3, 1, dtype=torch.float64), sums], 1)
    dw, ds, dq = sums[:, None, :] - sums[:, :, None]
    cost = (dq - ds.square() / dw.clamp(min=1e-300)).clamp(min=0)
    cost[torch.ones_like(cost).tril(-1) > 0] = torch.inf
    best = cost[0]
    for _ in range(n_levels - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[-1])


@pytest.mark.parametrize(("n_bins", "n_levels"), [(511, 16), (512, 3), (513, 8), (1500, 5)])
def test_equals_dense_programme_through_every_stride(n_bins: int, n_levels: int) -> None:
    centers, weights = random_problems(3, n_bins, seed=n_bins)
    expected = [dense_programme(x, w, n_levels) for x, w in zip(centers, weights, strict=True)]
    found = distortion(centers, weights, kmeans_1d(centers, weights, n_levels))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_levels", [1, 2, 5, 16])
def test_weights_that_vanish_beside_others_do_no_harm(n_levels: int) -> None:
    """Weights over 40 decades within a problem: optimal to rounding, which is relative to total weight and range."""
    centers, weights = random_problems(20, 300, seed=10)
    generator = torch.Generator().manual_seed(10)
    weights = weights * 10.0 ** (-40 * torch.rand(weights.shape, generator=generator, dtype=torch.float64))
    expected = [dense_programme(x, w, n_levels) for x, w in zip(centers, weights, strict=True)]
    found = distortion(centers, weights, kmeans_1d(centers, weights, n_levels))
    unit = weights.sum(-1) * (centers[:, -1] - centers[:, 0]).square()
    assert ((found - torch.tensor(expected, dtype=torch.float64)) <= 1e-13 * unit).all()


@pytest.mark.parametrize("shape", ["normal", "laplace"])
@pytest.mark.parametrize("n_levels", [4, 16])
def test_never_above_sklearn(shape: str, n_levels: int) -> None:
    sample = np.sort(getattr(np.random.default_rng(0), shape)(size=2000))
    problem = torch.from_numpy(sample)[None], torch.ones(1, len(sample), dtype=torch.float64)
    ours, rival = (distortion(*problem, solver(*problem, n_levels)) for solver in (kmeans_1d, kmeans_lloyd))
    assert ours.item() <= rival.item() * (1 + 1e-12)


def test_sklearn_is_called_as_kvquant_calls_it() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))[None]
    for seed in (0, 1):
        theirs = KMeans(n_clusters=8, random_state=seed, n_init="auto", max_iter=50).fit(values.T.numpy())
        found = kmeans_lloyd(values, torch.ones_like(values), 8, random_state=seed)
        assert np.array_equal(found[0].numpy(), np.sort(theirs.cluster_centers_[:, 0]))


def test_sklearn_with_weights_is_called_with_a_tolerance_in_their_variance() -> None:
    values, weights = random_problems(1, 300, seed=5, empty=0)
    x, w = values[0].numpy(), weights[0].numpy()
    mean = np.average(x, weights=w)
    tolerance = 1e-4 * np.average((x - mean) ** 2, weights=w) / x.var()  # sklearn multiplies it by the plain variance
    theirs = KMeans(n_clusters=6, random_state=0, n_init="auto", max_iter=50, tol=tolerance)
    wanted = theirs.fit(x[:, None], sample_weight=w).cluster_centers_[:, 0]
    assert np.allclose(kmeans_lloyd(values, weights, 6)[0].numpy(), np.sort(wanted), rtol=1e-12)


def test_sklearn_stops_at_the_same_levels_wherever_values_fall_into_bins() -> None:
    """Bins of zero weight, and bins that hold many values, change neither the start nor the rule to stop."""
    values, _ = random_problems(1, 500, seed=13, empty=0)
    far = torch.full((1, 50), 100.0, dtype=torch.float64)
    padded = torch.cat([values, far], 1), torch.cat([torch.ones_like(values), torch.zeros_like(far)], 1)
    assert torch.equal(kmeans_lloyd(*padded, 4), kmeans_lloyd(values, torch.ones_like(values), 4))
    bins, counts = values.unique(return_counts=True)
    best = distortion(values, torch.ones_like(values), kmeans_1d(values, torch.ones_like(values), 4))
    for seed in range(5):
        levels = kmeans_lloyd(bins[None], counts[None].double(), 4, random_state=seed)
        assert (levels.diff(dim=-1) > 0).all()
        assert best.item() <= distortion(values, torch.ones_like(values), levels).item() <= 1.2 * best.item()


def test_sklearn_keeps_few_values_as_they_are() -> None:
    centers, weights = torch.tensor([[0.3, 5.0, -1.0]]), torch.tensor([[1.0, 0.0, 2.0]])
    assert torch.equal(kmeans_lloyd(centers, weights, 4), torch.tensor([[-1.0, 0.3, 0.3, 0.3]]).double())


# Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table I.
@pytest.mark.parametrize(("n_levels", "limit"), [(2, 0.3634), (4, 0.1175), (8, 0.03455), (16, 0.009501)])
def test_gaussian_limits(n_levels: int, limit: float) -> None:
    centers, weights = gaussian_histogram()
    levels = kmeans_1d(centers, weights, n_levels)
    assert distortion(centers, weights, levels).item() == pytest.approx(limit, rel=0.01)
    torch.testing.assert_close(levels, -levels.flip(-1), rtol=0, atol=1e-2)


def test_every_level_is_the_mean_of_its_cell() -> None:
    centers, weights = random_problems(20, 300, seed=1)
    levels = kmeans_1d(centers, weights, 8)
    cell = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, centers)
    mass = torch.zeros_like(levels).scatter_add_(1, cell, weights)
    moment = torch.zeros_like(levels).scatter_add_(1, cell, weights * centers)
    torch.testing.assert_close(moment / mass, levels, rtol=0, atol=1e-12)


def test_distortion_by_levels_is_that_of_the_levels_and_never_rises() -> None:
    centers, weights = random_problems(20, 200, seed=2)
    every = distortion_by_levels(centers, weights, 16)
    single = [distortion(centers, weights, kmeans_1d(centers, weights, k)) for k in range(1, 17)]
    torch.testing.assert_close(every, torch.stack(single, -1), rtol=1e-9, atol=1e-11)
    assert (every.diff(dim=-1) <= 0).all()


def test_weight_two_is_a_repeated_bin_and_weight_zero_an_absent_one() -> None:
    centers, _ = random_problems(10, 60, seed=3)
    counts = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(3))
    repeated = centers.repeat_interleave(counts, dim=1)
    weighted = kmeans_1d(centers, counts.double().expand_as(centers), 6)
    torch.testing.assert_close(weighted, kmeans_1d(repeated, torch.ones_like(repeated), 6), rtol=0, atol=1e-12)


def test_empty_bins_far_away_cost_no_precision() -> None:
    centers, weights = random_problems(5, 50, seed=4, empty=0)
    far, none = torch.full((5, 1), 1e12, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)
    padded = kmeans_1d(torch.cat([-far, centers, far], 1), torch.cat([none, weights, none], 1), 4)
    torch.testing.assert_close(padded, kmeans_1d(centers, weights, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1e6), (1e-6, 0.0), (1e9, -3.0), (1.0, -1e6)])
def test_scale_and_shift_equivariant(scale: float, shift: float) -> None:
    centers, weights = random_problems(10, 128, seed=5)
    moved = kmeans_1d(centers * scale + shift, weights, 8)
    atol = 1e-12 * scale + 1e-15 * abs(shift)
    torch.testing.assert_close(moved, kmeans_1d(centers, weights, 8) * scale + shift, rtol=0, atol=atol)


def test_scale_of_the_weights_is_immaterial() -> None:
    centers, weights = random_problems(10, 128, seed=6)
    assert torch.equal(kmeans_1d(centers, weights * 2.0**-60, 8), kmeans_1d(centers, weights, 8))


def test_batch_equals_one_by_one_exactly() -> None:
    centers, weights = random_problems(10, 2000, seed=7)
    together = kmeans_1d(centers, weights, 8)
    alone = torch.cat([kmeans_1d(x[None], w[None], 8) for x, w in zip(centers, weights, strict=True)])
    assert torch.equal(together, alone)
    assert torch.equal(together, kmeans_1d(centers, weights, 8))


def test_the_number_of_threads_leaves_no_trace() -> None:
    centers, weights = random_problems(13, 300, seed=11)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5, 40):
            torch.set_num_threads(n_threads)
            found.append((kmeans_1d(centers, weights, 8), distortion_by_levels(centers, weights, 8)))
    finally:
        torch.set_num_threads(before)
    for levels, distortions in found[1:]:
        assert torch.equal(levels, found[0][0])
        assert torch.equal(distortions, found[0][1])


def test_a_level_of_one_value_is_that_value() -> None:
    """Empty bins before it once left it to rounding."""
    centers, weights = random_problems(300, 8, seed=12, empty=0.4)
    levels = kmeans_1d(centers, weights, 3)
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    for x, w, level, edge in zip(centers, weights, levels, edges, strict=True):
        for number in range(3):
            own = x[(w > 0) & (torch.searchsorted(edge, x) == number)].unique()
            assert len(own) != 1 or level[number] == own


def test_fine_problems_are_solved_too() -> None:
    centers, weights = gaussian_histogram(2**14 + 1)
    fine, coarse = kmeans_1d(centers, weights, 4), kmeans_1d(*gaussian_histogram(2**12), 4)
    torch.testing.assert_close(fine, coarse, rtol=0, atol=5e-3)


def test_few_distinct_values_are_levels_and_the_last_repeats() -> None:
    near = 1.0 + 1e-9
    centers = [[-1.0, 0.1, 0.1, 0.3, 7.0], [5.0, 5.0, 5.0, 5.0, 5.0], [1.0, near, 2.0, 3.0, 4.0]]
    weights = [[0.0, 1.0, 2.0, 1.0, 0.0], [1.0, 0.0, 2.0, 0.0, 0.0], [1.0, 1e-9, 1.0, 0.0, 1.0]]
    expected = [[0.1, 0.3, 0.3, 0.3], [5.0, 5.0, 5.0, 5.0], [1.0, near, 2.0, 4.0]]
    centers, weights, expected = (torch.tensor(t, dtype=torch.float64) for t in (centers, weights, expected))
    levels = kmeans_1d(centers, weights, 4)
    assert torch.equal(levels, expected)
    assert torch.equal(distortion(centers, weights, levels), torch.zeros(3, dtype=torch.float64))


def test_hard_problems_stay_finite_and_ascending() -> None:
    """Weights over 40 decades, an outlier a billion away, values closer than rounding resolves."""
    centers, weights = random_problems(30, 100, seed=8)
    weights = weights * 10.0 ** torch.linspace(-40, 0, 30, dtype=torch.float64)[:, None]
    weights[:10, ::2] *= 1e-30
    centers[10:20, -1] = 1e9
    centers[20:] = 1 + centers[20:] * 1e-14
    levels = kmeans_1d(centers, weights, 16)
    assert levels.isfinite().all()
    assert (levels.diff(dim=-1) >= 0).all()
    assert ((levels >= centers[:, :1]) & (levels <= centers[:, -1:])).all()


def test_single_precision_input_gives_double_levels() -> None:
    centers, weights = random_problems(3, 40, seed=9)
    levels = kmeans_1d(centers.float(), weights.float(), 4)
    assert levels.dtype == torch.float64
    torch.testing.assert_close(levels, kmeans_1d(centers.float().double(), weights.float().double(), 4), rtol=0, atol=0)


X, W = torch.tensor([[0.0, 1.0, 2.0]]), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("centers", "weights", "n_levels", "message"),
    [
        (torch.tensor([[0.0, 1.0, torch.inf]]), W, 2, "expected finite values; got 1 bins"),
        (X, torch.tensor([[torch.nan, 1.0, torch.nan]]), 2, "expected finite values; got 2 bins"),
        (X.repeat(2, 1), torch.cat([W, 0 * W]), 2, r"positive total weight; got zero in problems \[1\]"),
        (X, -W, 2, "expected weights >= 0; got 3 negative"),
        (X.flip(-1), W, 2, "expected ascending centers; got 2 descents"),
        (X, W, 0, "expected at least 1 level; got 0"),
        (X[:, :0], W[:, :0], 2, "not empty"),
    ],
)
@pytest.mark.parametrize("function", [kmeans_1d, distortion_by_levels])
def test_refuses(
    function: Callable[..., Tensor], centers: Tensor, weights: Tensor, n_levels: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{function.__name__}: .*{message}"):
        function(centers, weights, n_levels)


def test_distortion_refuses_levels_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="distortion: expected finite levels for 1 problems"):
        distortion(X, W, torch.tensor([[0.0, torch.nan]]))
