"""Statistics: any chunking, order or sharding gives the same; each against numpy or a few plain lines."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from artifacts.errors import ArtifactError, CorruptArtifactError, MismatchError, NonFiniteError
from artifacts.model.attention import attention_layers, rotate
from artifacts.sites import Site, Stage
from calib.calibration import add_windows, new_statistics
from calib.capture import Vectors, capture, collect
from calib.solvers.threads import for_each
from calib.statistics.channel_histogram import ChannelHistogram
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.moments import CrossMoments, Moments
from calib.statistics.pair_norms import PairNorms, rotary_pairs
from calib.statistics.row_sample import RowSample, priorities
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SAMPLE_TOKENS, SiteStatistics, Tier
from calib.statistics.statistic import Statistic
from calib.statistics.tails import Tails
from calib.statistics.token_batch import TokenBatch
from calib.statistics.token_histogram import OUTLIER_FRACTIONS, TokenHistogram

pytestmark = pytest.mark.shapes

CHANNELS = 16
FACTORIES: dict[str, Callable[[], Statistic]] = {
    "tails": lambda: Tails(CHANNELS, depth=64),
    "channel histogram": lambda: ChannelHistogram(CHANNELS, bins=64),
    "token histogram": lambda: TokenHistogram(CHANNELS, bins=128),
    "moments per head": lambda: Moments(CHANNELS, 4),
    "moments of the layer": lambda: Moments(CHANNELS, 1),
    "pair norms": lambda: PairNorms(rotary_pairs(2, 8, 8, interleaved=False)),
}
every_statistic = pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)


def tokens(n: int, seed: int = 0, channels: int = CHANNELS) -> Tensor:
    """Channels of very different scales and offsets, with outliers, a constant and a zero among them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-4, 4, channels)
    x = torch.randn(n, channels, generator=generator) * scale + 3 * scale.flip(0)
    outlying = torch.rand(n, channels, generator=generator) < 0.01
    x = torch.where(outlying, 50 * x, x)
    x[:, 1], x[:, 2] = 0.1, 0.0
    return x


def fed(statistic: Statistic, *chunks: Tensor) -> Statistic:
    for chunk in chunks:
        statistic.update(chunk)
    return statistic


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Counts and order statistics exactly, sums of products to 1e-6 of sqrt(M_ii M_jj), other sums to 1e-6."""
    assert found.keys() == expected.keys()
    for name, other in expected.items():
        own, name = found[name], name.rsplit(".", 1)[-1]
        if own.dtype != torch.float64:
            assert torch.equal(own, other), name
        elif name == "products":
            size = other.diagonal(dim1=-2, dim2=-1).sqrt()
            assert ((own - other).abs() <= 1e-6 * size[..., :, None] * size[..., None, :]).all(), name
        else:
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


# Contract


@every_statistic
@pytest.mark.parametrize("chunk", [7, 199])
def test_chunked_is_one_shot(make: Callable[[], Statistic], chunk: int) -> None:
    x = tokens(400)
    assert_same(fed(make(), *x.split(chunk)).state(), fed(make(), x).state())
    assert_same(fed(make(), *x[:40].split(1)).state(), fed(make(), x[:40]).state())


@every_statistic
def test_order_does_not_matter(make: Callable[[], Statistic]) -> None:
    x = tokens(400)
    whole = fed(make(), x).state()
    assert_same(fed(make(), x.flip(0)).state(), whole)
    assert_same(fed(make(), *reversed(x.split(31))).state(), whole)


@every_statistic
def test_merged_shards_are_the_whole(make: Callable[[], Statistic]) -> None:
    x = tokens(400)
    for sizes in ([100, 300], [1, 399], [150, 120, 130]):
        first, *others = [fed(make(), part) for part in x.split(sizes)]
        for other in others:
            first.merge(other)
        assert_same(first.state(), fed(make(), x).state())


@every_statistic
def test_merging_an_empty_one_changes_nothing(make: Callable[[], Statistic]) -> None:
    x = tokens(100)
    whole, empty = fed(make(), x), make()
    whole.merge(make())
    whole.update(x[:0])
    empty.merge(fed(make(), x))
    assert_same(whole.state(), fed(make(), x).state())
    assert_same(empty.state(), whole.state())


@every_statistic
def test_restores_its_state(make: Callable[[], Statistic]) -> None:
    whole, other = fed(make(), tokens(100)), make()
    other.restore(whole.state())
    for name, tensor in whole.state().items():
        assert torch.equal(other.state()[name], tensor)
        assert other.state()[name].data_ptr() != tensor.data_ptr()
    assert other.nbytes == whole.nbytes == make().nbytes
    more = tokens(50, seed=1)
    assert_same(fed(other, more).state(), fed(whole, more).state())


@every_statistic
def test_refuses_a_foreign_state(make: Callable[[], Statistic]) -> None:
    statistic = make()
    for name, tensor in statistic.state().items():
        for wrong in (torch.zeros(3, 5, 7, dtype=tensor.dtype), tensor.to(torch.float16)):
            with pytest.raises(ValueError, match=rf"{type(statistic).__name__}\.{name}: expected .* got torch"):
                statistic.restore({**statistic.state(), name: wrong})
        with pytest.raises(ValueError, match="got nothing"):
            statistic.restore({key: t for key, t in statistic.state().items() if key != name})


def weigh(statistic: Statistic, x: Tensor) -> Statistic:
    """Fed with weights where it takes any."""
    weights = x.double().square() / 7 + 1
    weighted = isinstance(statistic, ChannelHistogram | TokenHistogram) and statistic.counts.is_floating_point()
    for part, own in zip(x.split(150), weights.split(150), strict=True):
        statistic.update(part, own) if weighted else statistic.update(part)
    return statistic


WEIGHTED: dict[str, Callable[[], Statistic]] = {
    "weighted channels": lambda: ChannelHistogram(CHANNELS, bins=64, dtype=torch.float64),
    "weighted tokens": lambda: TokenHistogram(CHANNELS, bins=128, dtype=torch.float64),
    "channels in 64 bits": lambda: ChannelHistogram(CHANNELS, bins=64, dtype=torch.int64),
}


@pytest.mark.parametrize("make", [*FACTORIES.values(), *WEIGHTED.values()], ids=[*FACTORIES, *WEIGHTED])
def test_compiled_loops_and_torch_agree(make: Callable[[], Statistic], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the same is done by torch operations, which run on the CPU too."""
    x = tokens(400)
    compiled, by_torch = make(), make()
    weigh(compiled, x).merge(weigh(make(), 3 * x))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    weigh(by_torch, x).merge(weigh(make(), 3 * x))
    for name, tensor in by_torch.state().items():
        torch.testing.assert_close(
            compiled.state()[name], tensor, rtol=1e-12 if tensor.dtype == torch.float64 else 0, atol=0
        )


@every_statistic
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_those_numbers_in_float32(make: Callable[[], Statistic], dtype: torch.dtype) -> None:
    x = tokens(60).clamp(-6e4, 6e4).to(dtype)
    assert_same(fed(make(), x).state(), fed(make(), x.float()).state())


@every_statistic
def test_no_layout_and_no_input_is_changed(make: Callable[[], Statistic]) -> None:
    x = tokens(100)
    strided, kept = x.repeat_interleave(2, dim=1)[:, ::2], x.clone()
    assert_same(fed(make(), strided, x.T.contiguous().T).state(), fed(make(), x, x).state())
    assert torch.equal(x, kept)


def test_cross_moments_add_up() -> None:
    x, y = tokens(300, 1), tokens(300, 2, channels=5)
    whole, left, right = (CrossMoments(CHANNELS, 5) for _ in range(3))
    whole.update(x, y)
    left.update(x[200:], y[200:])
    right.update(x[:200], y[:200])
    left.merge(right)
    size = x.double().square().sum(0).sqrt()[:, None] * y.double().square().sum(0).sqrt()
    for moments in (whole, left):
        assert ((moments.products - x.double().T @ y.double()).abs() <= 1e-6 * size).all()


# Tails


@pytest.mark.parametrize("n", [2, 3, 50, 1000, 5000])
@pytest.mark.parametrize("tail", [0.0, 0.001, 0.005, 0.0123])
def test_tails_are_numpy_percentiles(n: int, tail: float) -> None:
    x = tokens(n)
    tails = Tails(CHANNELS, depth=64)
    fed(tails, *x.split(300))
    assert tails.covers(tail) == (int(tail * (n - 1)) + 1 < min(64, n))
    if tails.covers(tail):
        expected = np.percentile(x.double().numpy(), [100 * tail, 100 * (1 - tail)], axis=0)
        for found, right in zip(tails.quantiles(tail), expected, strict=True):
            scale = x.abs().amax(0).double().numpy()
            assert (np.abs(found.double().numpy() - right) <= 2e-7 * scale).all()
    assert torch.equal(tails.minimum, x.amin(0))
    assert torch.equal(tails.maximum, x.amax(0))


# Channel histogram


def histogram_of(x: Tensor, bins: int = 2048, chunk: int = 1000) -> ChannelHistogram:
    histogram = ChannelHistogram(x.shape[1], bins)
    fed(histogram, *x.split(chunk))
    return histogram


def test_bins_hold_what_numpy_says() -> None:
    x = tokens(3000)
    histogram = histogram_of(x, bins=256)
    assert (histogram.counts.sum(dim=1) == 3000).all()
    width = histogram.width().double()
    assert torch.equal(torch.frexp(histogram.width()).mantissa, torch.full((CHANNELS,), 0.5))
    first = histogram.first.double()
    for channel in range(CHANNELS):
        edges = (first[channel] + torch.arange(257)) * width[channel]
        assert edges[0] <= x[:, channel].min()
        assert x[:, channel].max() < edges[-1]
        expected, _ = np.histogram(x[:, channel].double().numpy(), bins=edges.numpy())
        assert (histogram.counts[channel].numpy() == expected).all()


def test_bins_are_as_narrow_as_the_range_allows() -> None:
    x = torch.randn(2000, CHANNELS) * torch.logspace(-6, 6, CHANNELS)
    histogram = histogram_of(x, bins=256)
    spanned = (x.amax(0) - x.amin(0)) / histogram.width()
    assert ((spanned > 256 / 2 - 2) & (spanned <= 256)).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1.0, 1e4, -1e-30])
@pytest.mark.parametrize("other", [-1e6, -1e-9, 1e-6, 0.0999999, 0.99999, 1e30])
def test_a_constant_that_ends_is_order_free(value: float, other: float) -> None:
    x = torch.full((20, 1), value)
    x[7] = other
    apart, turned = histogram_of(x, 64, chunk=1), histogram_of(x.flip(0), 64, chunk=1)
    assert_same(apart.state(), histogram_of(x, 64).state())
    assert_same(turned.state(), apart.state())


def test_growth_by_outliers_keeps_every_count() -> None:
    x = torch.randn(500, 2)
    x[100], x[200], x[300] = 30.0, -7e3, 1e7
    histogram = histogram_of(x, chunk=50)
    assert_same(histogram.state(), histogram_of(x.flip(0)).state())
    assert (histogram.counts.sum(dim=1) == 500).all()
    assert (histogram.counts.gt(0).sum(dim=1) <= 3).all()


def test_unit_spread_far_from_zero_is_resolved() -> None:
    x = torch.randn(4000, 3) + torch.tensor([1e4, -1e4, 0.0])
    histogram = histogram_of(x)
    assert (histogram.width() <= 8 / 1024).all()
    mean = (histogram.counts * histogram.centers().double()).sum(dim=1) / 4000
    assert ((mean - x.double().mean(0)).abs() < histogram.width()).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e30, -1e-30])
def test_constants_fill_one_bin(value: float) -> None:
    histogram = histogram_of(torch.full((50, 1), value))
    assert histogram.counts.max() == 50
    low, high = histogram.quantiles(0.005)
    assert low == high == torch.tensor(value)


@pytest.mark.parametrize("tail", [0.0, 0.005, 0.05, 0.2])
def test_histogram_quantiles_are_right_within_a_bin(tail: float) -> None:
    x = tokens(3001)
    ordered = x.sort(dim=0).values
    histogram = histogram_of(x)
    for found, share in zip(histogram.quantiles(tail), (tail, 1 - tail), strict=True):
        expected = ordered[min(int(3001 * share), 3000)]
        assert ((found - expected).abs() <= histogram.width()).all()


# Token histogram


def naive_token_histogram(x: Tensor, fraction: float, bins: int) -> tuple[np.ndarray, np.ndarray]:
    counts, weights = np.zeros(bins, dtype=int), np.zeros(bins)
    for row in x.double().numpy():
        low, high = np.percentile(row, [50 * fraction, 100 - 50 * fraction])
        inner = row[(row > low) & (row < high)] if fraction else row
        middle, half = (inner.max() + inner.min()) / 2, (inner.max() - inner.min()) / 2
        index = np.clip(((inner - middle) / half + 1) * bins / 2, 0, bins - 1).astype(int)
        np.add.at(counts, index, 1)
        np.add.at(weights, index, half**2)
    return counts, weights


def test_token_histogram_is_the_naive_one() -> None:
    x = torch.randn(60, 200)
    histogram = TokenHistogram(200, bins=64)
    fed(histogram, x)
    for row, fraction in enumerate(OUTLIER_FRACTIONS):
        counts, weights = naive_token_histogram(x, fraction, 64)
        moved = np.abs(np.cumsum(histogram.counts[row].numpy() - counts)).max()  # values that rounding puts next door
        assert moved <= 2
        assert histogram.counts[row].sum() == counts.sum()
        np.testing.assert_allclose(histogram.weights[row].sum(), weights.sum(), rtol=1e-5)
    assert histogram.centers()[0] == -histogram.centers()[-1] == 1 / 64 - 1


def test_a_token_of_denormals_is_counted() -> None:
    """The inverse of its range overflowed, and the count failed over a negative bin."""
    histogram = TokenHistogram(8)
    fed(histogram, 1e-39 * torch.arange(8.0)[None])
    assert (histogram.counts.sum(1) > 0).all()
    assert histogram.counts[0, 0] == 1


def test_tokens_without_spread_are_left_out() -> None:
    histogram = TokenHistogram(8)
    fed(histogram, torch.full((5, 8), 3.0))
    assert not histogram.counts.any()


# Moments


def test_moments_are_direct_products() -> None:
    x = tokens(200)
    per_head, layer = Moments(CHANNELS, 4), Moments(CHANNELS, 1)
    fed(per_head, x), fed(layer, x)
    whole = x.double().T @ x.double() / 200
    size = whole.diagonal().sqrt()[:, None] * whole.diagonal().sqrt()
    assert ((layer.second()[0] - whole).abs() <= 1e-9 * size).all()
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        assert ((per_head.second()[head] - whole[part, part]).abs() <= 1e-9 * size[part, part]).all()
    torch.testing.assert_close(per_head.mean(), x.double().mean(0))


# Rotary pairs


def test_rotary_pairs_of_half_interleaved_and_partial() -> None:
    def pairs(**kwargs: bool) -> list[tuple[int, int]]:
        first, second = rotary_pairs(2, 8, 4, **kwargs)
        return list(zip(first.tolist(), second.tolist(), strict=True))

    assert pairs(interleaved=False) == [(0, 2), (1, 3), (8, 10), (9, 11)]
    assert pairs(interleaved=True) == [(0, 1), (2, 3), (8, 9), (10, 11)]


@pytest.mark.parametrize("rotation", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_pair_norms_bound_keys_at_any_position(rotation: str, rotary_dim: int) -> None:
    heads, head_dim, n = 2, 8, 100
    keys = torch.randn(1, heads, n, head_dim)
    pairs = rotary_pairs(heads, head_dim, rotary_dim, interleaved=rotation == "interleaved")
    norms = PairNorms(pairs)
    fed(norms, keys[0].transpose(0, 1).reshape(n, -1))
    once = torch.rand(n, rotary_dim // 2) * 1000
    angles = torch.cat([once, once], -1) if rotation == "half" else once.repeat_interleave(2, -1)
    rotated = rotate(keys, angles.cos()[None], angles.sin()[None], rotation)[0].transpose(0, 1).reshape(n, -1)
    turned = PairNorms(pairs)
    fed(turned, rotated)
    for index in pairs:
        assert (rotated[:, index].abs() <= norms.bound() * (1 + 1e-6)).all()
    torch.testing.assert_close(turned.mean_square(), norms.mean_square(), rtol=1e-5, atol=0)
    torch.testing.assert_close(turned.bound(), norms.bound(), rtol=1e-5, atol=0)


# Row sample


def sampled(batches: list[tuple[int, Tensor]], capacity: int) -> tuple[RowSample, Tensor]:
    """A sample of tokens whose rows are (window, position)."""
    sample, rows = RowSample(capacity), torch.empty(0, 2)
    for seed, positions in batches:
        choice = sample.choose(priorities(seed, positions), positions)
        rows = choice.apply(rows, torch.stack([torch.full_like(positions, seed), positions], 1).float())
    return sample, rows


@pytest.mark.parametrize("capacity", [1, 20, 60, 100])
def test_row_sample_knows_no_order_and_no_shards(capacity: int) -> None:
    batches = [(seed, torch.arange(20)) for seed in (3, 1, 4)]
    whole, rows = sampled(batches, capacity)
    turned, same_rows = sampled(batches[::-1], capacity)
    (left, left_rows), (right, right_rows) = sampled(batches[:1], capacity), sampled(batches[1:], capacity)
    merged = left.merge(right).apply(left_rows, right_rows)
    for sample, found in ((turned, same_rows), (left, merged)):
        assert torch.equal(sample.priorities, whole.priorities)
        assert torch.equal(sample.positions, whole.positions)
        assert torch.equal(found, rows)
        assert (sample.n_seen, sample.complete) == (60, capacity >= 60)
    assert len(rows) == min(capacity, 60)
    assert torch.equal(rows[:, 1].long(), whole.positions)


def test_priorities_are_spread_and_depend_on_both() -> None:
    positions = torch.arange(4000)
    drawn = torch.cat([priorities(seed, positions) for seed in (0, 1, 2**64 - 1)])
    assert len(drawn.unique()) == len(drawn)
    assert (drawn >= 0).all()
    assert abs(drawn.double().mean() / 2**63 - 0.5) < 0.02


# Statistics of a model


def windows_of(n: int = 6, n_tokens: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (n, n_tokens), generator=torch.Generator().manual_seed(seed))


def gathered(
    model: LlamaForCausalLM, windows: Tensor, tier: Tier = "basic", stage: Stage = "pre_rope", **origin: object
) -> ModelStatistics:
    layers = attention_layers(model)
    statistics = new_statistics(model, layers, stage=stage, tier=tier, **origin)
    add_windows(model, layers, statistics, windows)
    return statistics


def states(statistics: ModelStatistics) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for site, own in statistics.sites.items():
        yield str(site), own.state()


def assert_same_model(found: ModelStatistics, expected: ModelStatistics) -> None:
    for (site, own), (_, other) in zip(states(found), states(expected), strict=True):
        assert_same(own, other), site
    for pair, moments in expected.cross.items():
        torch.testing.assert_close(found.cross[pair].products, moments.products, rtol=1e-6, atol=1e-9)
    for name in ("sample", "first"):
        assert torch.equal(getattr(found, name).priorities, getattr(expected, name).priorities)
        assert getattr(found, name).n_seen == getattr(expected, name).n_seen
    assert (found.n_tokens, found.seqlen, found.corpus) == (expected.n_tokens, expected.seqlen, expected.corpus)
    assert torch.equal(found.ngrams, expected.ngrams)


@pytest.mark.parametrize("tier", ["basic", "full"])
def test_shards_and_order_of_windows_do_not_matter(tiny_llama: LlamaForCausalLM, tier: Tier) -> None:
    windows = windows_of(n_tokens=40)
    whole = gathered(tiny_llama, windows, tier)
    merged = gathered(tiny_llama, windows[4:], tier)
    merged.merge(gathered(tiny_llama, windows[:4], tier))
    assert_same_model(merged, whole)
    assert_same_model(gathered(tiny_llama, windows.flip(0), tier), whole)
    assert whole.has_all_first_positions


def test_the_reservoir_overflows_alike_in_any_order(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLE_TOKENS, "basic", 30)
    windows = windows_of()
    whole = gathered(tiny_llama, windows)
    merged = gathered(tiny_llama, windows[1::2])
    merged.merge(gathered(tiny_llama, windows[::2]))
    assert_same_model(merged, whole)
    assert len(whole.sites[Site(0, "value")].rows) == len(whole.sites[Site(0, "value")].first_rows) == 30
    assert not whole.has_all_first_positions


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_save_load_save_gives_the_same_bytes(tiny_llama: LlamaForCausalLM, tmp_path: Path, suffix: str) -> None:
    statistics = gathered(tiny_llama, windows_of(n_tokens=40), "full", corpus="some text", seed=3)
    first, second, third = (tmp_path / f"{name}{suffix}" for name in "abc")
    statistics.save(first)
    loaded = ModelStatistics.load(first)
    loaded.save(second)
    gathered(tiny_llama, windows_of(n_tokens=40), "full", corpus="some text", seed=3).save(third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert_same_model(loaded, statistics)
    loaded.merge(gathered(tiny_llama, windows_of(n_tokens=40, seed=1), "full", corpus="other text", seed=3))
    assert loaded.origin.corpus == "other text+some text"
    assert loaded.origin.seed == 3


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"no statistics")
    with pytest.raises(CorruptArtifactError, match=r"s\.safetensors"):
        ModelStatistics.load(path)


def other_model(model: LlamaForCausalLM) -> ModelStatistics:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 123.0}
    return gathered(model, windows_of(seed=1))


REFUSALS: dict[str, tuple[Callable[[LlamaForCausalLM], ModelStatistics], str]] = {
    "the same shard": (lambda m: gathered(m, windows_of()), "6 of 6 windows are in both shards"),
    "one window": (lambda m: gathered(m, windows_of()[5:]), "1 of 1 windows"),
    "another model": (other_model, "differ in model"),
    "another id": (lambda m: gathered(m, windows_of(seed=1), model_id="x/y"), "differ in model_id: None and 'x/y'"),
    "another tier": (lambda m: gathered(m, windows_of(seed=1), "full"), "differ in tier: basic and full"),
    "another stage": (lambda m: gathered(m, windows_of(seed=1), stage="post_rope"), r"layers\.0\.key.* one shard"),
}


@pytest.mark.parametrize(("make", "message"), REFUSALS.values(), ids=REFUSALS)
def test_shards_that_do_not_belong_together_are_refused(
    tiny_llama: LlamaForCausalLM, make: Callable[[LlamaForCausalLM], ModelStatistics], message: str
) -> None:
    statistics = gathered(tiny_llama, windows_of())
    before = gathered(tiny_llama, windows_of())
    with pytest.raises(MismatchError, match=message):
        statistics.merge(make(tiny_llama))
    assert_same_model(statistics, before)


def test_shards_of_another_version_are_refused(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = gathered(tiny_llama, windows_of())
    monkeypatch.setattr("calib.calibration.tool_version", lambda: "9.9")
    with pytest.raises(MismatchError, match=r"differ in tool_version: .* and '9\.9'"):
        statistics.merge(gathered(tiny_llama, windows_of(seed=1)))


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_enters(tiny_llama: LlamaForCausalLM, side: str) -> None:
    windows = [windows_of(1, n, seed=n)[0] for n in (5, 17, 30)]
    layers = attention_layers(tiny_llama)
    alone, padded = (new_statistics(tiny_llama, layers, stage="post_rope", tier="full") for _ in range(2))
    collect(tiny_llama, layers, alone, [(window[None], None) for window in windows])
    ids, mask = torch.full((3, 30), 63), torch.zeros(3, 30, dtype=torch.bool)
    for row, window in enumerate(windows):
        place = slice(30 - len(window), 30) if side == "left" else slice(len(window))
        ids[row, place], mask[row, place] = window, True
    collect(tiny_llama, layers, padded, [(ids, mask)])
    assert (padded.n_tokens, padded.seqlen, padded.windows) == (52, 30, alone.windows)
    assert torch.equal(padded.sample.priorities, alone.sample.priorities)
    assert torch.equal(padded.first.positions, alone.first.positions)
    for site, own in padded.sites.items():
        other = alone.sites[site]
        assert torch.equal(own.moments.n_tokens, other.moments.n_tokens)
        for name in ("rows", "first_rows"):
            torch.testing.assert_close(getattr(own, name), getattr(other, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.moments.products, other.moments.products, rtol=1e-4, atol=1e-4)
        if site.tensor != "query":
            torch.testing.assert_close(own.tails.largest, other.tails.largest, rtol=1e-4, atol=1e-5)
            assert torch.equal(own.histogram.counts.sum(1), other.histogram.counts.sum(1))


def test_a_batch_is_its_windows_one_by_one(tiny_llama: LlamaForCausalLM) -> None:
    windows, layers = windows_of(), attention_layers(tiny_llama)
    batched = new_statistics(tiny_llama, layers)
    collect(tiny_llama, layers, batched, [(windows[:4], None), (windows[4:], None)])
    alone = gathered(tiny_llama, windows)
    assert (batched.n_tokens, batched.windows) == (alone.n_tokens, alone.windows)
    for site, own in batched.sites.items():
        torch.testing.assert_close(own.rows, alone.sites[site].rows, rtol=1e-4, atol=1e-5)


# Threads


@pytest.fixture
def three_threads() -> Iterator[None]:
    """As many as a machine with more cores would use."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_change_no_bit(tiny_llama: LlamaForCausalLM, three_threads: None) -> None:
    vectors, gathered_with = captured(tiny_llama, windows_of(3), gathered(tiny_llama, windows_of(3)), 0), []
    positions = torch.arange(24).repeat(3)
    batch = TokenBatch(positions, torch.arange(3).repeat_interleave(24), ["1", "2", "3"])
    for n_threads in (3, 1):
        torch.set_num_threads(n_threads)
        statistics = new_statistics(tiny_llama, attention_layers(tiny_llama), tier="full")
        statistics.update(batch, vectors)
        gathered_with.append(dict(states(statistics)))
    for site, state in gathered_with[0].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, gathered_with[1][site][name]), (site, name)


def test_every_thread_has_one_thread_of_torch(three_threads: None) -> None:
    seen = list[int]()
    for_each(lambda item: seen.append(torch.get_num_threads()), range(20))
    assert seen == [1] * 20
    assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        for_each(lambda item: 1 / item, range(20))
    assert torch.get_num_threads() == 3


# Numbers that are none


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_with_nan_or_inf_is_refused_whole(tiny_llama: LlamaForCausalLM, bad: float) -> None:
    statistics, before = gathered(tiny_llama, windows_of()), gathered(tiny_llama, windows_of())
    layers, more = attention_layers(tiny_llama), windows_of(2, seed=5)
    more[more == 63] = 0
    more[1, 10] = 63
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[63, 0] = bad
    with pytest.raises(NonFiniteError, match=r"layers\.0\.\w+.*: \d+ of 1536 values are .* first in window 7"):
        collect(tiny_llama, layers, statistics, [(more, None)])
    assert_same_model(statistics, before)
    with pytest.raises(NonFiniteError, match="first in window 7"):
        add_windows(tiny_llama, layers, statistics, more)
    assert len(statistics.windows) == 7


def test_the_model_is_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    windows, before = windows_of(1), {name: p.clone() for name, p in tiny_llama.named_parameters()}
    gathered(tiny_llama, windows)
    assert tiny_llama.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.modules())
    assert all(torch.equal(p, before[name]) for name, p in tiny_llama.named_parameters())


def test_statistics_of_a_half_precision_model_are_wide(tiny_llama: LlamaForCausalLM) -> None:
    statistics = gathered(tiny_llama.to(torch.bfloat16), windows_of(2))
    for _, state in states(statistics):
        assert not {t.dtype for t in state.values()} & {torch.bfloat16, torch.float16}


# Positions


def captured(model: LlamaForCausalLM, windows: Tensor, statistics: ModelStatistics, start: int) -> Vectors:
    """Every site's vectors from position `start` on."""
    layers = attention_layers(model)
    parts = [capture(model, layers, statistics.sites, window[None]) for window in windows]
    return {site: torch.cat([part[site][start:] for part in parts]) for site in statistics.sites}


def test_tokens_that_come_before_a_choice_is_read_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    """What is folded in when it is read would mix the chosen tokens with later ones."""
    statistics = gathered(tiny_llama, windows_of(2))
    site = next(iter(statistics.sites))
    chosen = statistics.site(site, 1)
    add_windows(tiny_llama, attention_layers(tiny_llama), statistics, windows_of(3)[2:])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{site}: tokens were added .* select the positions again"):
            chosen.tails  # noqa: B018
    assert statistics.site(site, 1).tails.n_tokens > chosen.moments.n_tokens


@pytest.mark.parametrize("sink_tokens", [0, 1, 3, 8])
def test_first_positions_can_be_left_out_afterwards(tiny_llama: LlamaForCausalLM, sink_tokens: int) -> None:
    windows = windows_of(3)
    statistics = gathered(tiny_llama, windows, "full")
    for site, x in captured(tiny_llama, windows, statistics, sink_tokens).items():
        chosen = statistics.site(site, sink_tokens)
        direct = SiteStatistics(chosen.shape, "full")
        direct.update(x)
        for name, statistic in direct.statistics.items():
            found = {key: chosen.state()[f"{name}.{key}"] for key in statistic.state()}
            assert_same(found, statistic.state())
        if site.tensor != "query":
            assert {tuple(row) for row in chosen.rows.tolist()} == {tuple(row) for row in x.tolist()}


def test_choosing_positions_leaves_the_statistics_alone(tiny_llama: LlamaForCausalLM) -> None:
    statistics, before = gathered(tiny_llama, windows_of()), gathered(tiny_llama, windows_of())
    for site in statistics.sites:
        statistics.site(site, 0), statistics.site(site, 5)
    assert_same_model(statistics, before)


def test_what_a_fit_cannot_leave_out_or_find_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    statistics = gathered(tiny_llama, windows_of(2, n_tokens=8))
    site = Site(0, "value")
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match=f"first 8 positions can be left out of a fit; got {wrong}"):
            statistics.site(site, wrong)
    with pytest.raises(ValueError, match=r"layers\.0\.value: a fit needs tokens from position 8 on; the 2 windows"):
        statistics.site(site, 8)
    with pytest.raises(ValueError, match=r"layers\.9\.value: expected one of the sites layers"):
        statistics.site(Site(9, "value"), 0)


# Products across sites


def test_full_statistics_hold_products_between_neighbours(tiny_llama: LlamaForCausalLM) -> None:
    windows = windows_of(3)
    statistics = gathered(tiny_llama, windows, "full")
    keys, values = (
        [Site(layer, name, stage) for layer in (0, 1)] for name, stage in (("key", "pre_rope"), ("value", None))
    )
    expected = {(keys[0], values[0]), (keys[1], values[1])} | {
        (a, b) for a in (keys[0], values[0]) for b in (keys[1], values[1])
    }
    assert set(statistics.cross) == expected
    x = captured(tiny_llama, windows, statistics, 8)
    for (left, right), moments in statistics.cross.items():
        torch.testing.assert_close(moments.products, x[left].double().T @ x[right].double())
    assert not gathered(tiny_llama, windows).cross


@pytest.mark.parametrize("stage", ["pre_rope", "post_rope"])
def test_query_energy_is_what_reads_a_key_channel(tiny_llama: LlamaForCausalLM, stage: Stage) -> None:
    windows = windows_of(3)
    statistics = gathered(tiny_llama, windows, stage=stage)
    key, query = Site(1, "key", stage), Site(1, "query", stage)
    squares = captured(tiny_llama, windows, statistics, 2)[query].double().square().mean(0).view(4, 8)
    expected = torch.empty(2, 8, dtype=torch.float64)
    for head in range(2):
        own = (squares[2 * head] + squares[2 * head + 1]) / 2  # two query heads read one key head
        for pair in range(4):
            expected[head, pair] = expected[head, pair + 4] = (own[pair] + own[pair + 4]) / 2
    torch.testing.assert_close(statistics.site(key, 2).query_energy, expected.view(-1))
    values = statistics.site(Site(1, "value"), 2)
    assert values.query_energy is None
    keys = statistics.site(key, 2)
    scores = keys.rows.double().square() @ keys.query_energy
    torch.testing.assert_close(values.token_weights, (scores / scores.mean()).float())


# Memory


def test_what_a_wrapper_hands_on_is_computed_when_it_is_read() -> None:
    """And is that of the mapped tokens, whatever was read before."""
    shape = SiteShape(site=Site(0, "value"), heads=2, head_dim=4)
    x, gradients = torch.randn(2, 30, shape.channels).unbind()
    mapped, expected = (SiteStatistics(shape, "full", fisher=True) for _ in range(2))
    mapped = mapped.mapped(x, gradients)
    expected.update(x, gradients)
    assert int(mapped.statistics["moments"].state()["n_tokens"]) == 0
    for name, statistic in expected.statistics.items():
        for _ in range(2):
            for key, tensor in getattr(mapped, name).state().items():
                assert torch.equal(tensor, statistic.state()[key]), (name, key)
    for key, tensor in SiteStatistics(shape, "full", fisher=True).mapped(x, gradients).state().items():
        if "." in key:
            assert torch.equal(tensor, expected.state()[key]), key


@pytest.mark.parametrize("tier", ["basic", "full"])
def test_memory_is_bounded_by_the_estimate(
    tiny_llama: LlamaForCausalLM, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLE_TOKENS, tier, 50)
    statistics = new_statistics(tiny_llama, attention_layers(tiny_llama), tier=tier)
    estimate = statistics.estimated_bytes()
    add_windows(tiny_llama, attention_layers(tiny_llama), statistics, windows_of(8))
    held = sum(tensor.nbytes for _, state in states(statistics) for tensor in state.values())
    held += sum(moments.products.nbytes for moments in statistics.cross.values())
    assert held == estimate == statistics.estimated_bytes()


@pytest.mark.parametrize(("tier", "advice"), [("basic", "another machine"), ("full", "Use --statistics basic")])
def test_more_memory_than_is_free_is_refused(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tier: Tier, advice: str
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(MemoryError, match=rf"statistics of tier {tier} need \d+\.\d MiB; 0\.0 MiB are free.*{advice}"):
        new_statistics(tiny_llama, attention_layers(tiny_llama), tier=tier)


def test_statistics_that_were_stopped_within_a_window_are_not_saved(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C left sites with other windows than the rest, and they were saved and gone on from."""
    statistics = gathered(tiny_llama, windows_of(1))

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calib.statistics.site_statistics.SiteStatistics.keep_first_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        add_windows(tiny_llama, attention_layers(tiny_llama), statistics, windows_of(2)[1:])
    assert not statistics.is_whole
    with pytest.raises(ArtifactError, match="update of these statistics was interrupted"):
        statistics.save(tmp_path / "s.safetensors")


def test_statistics_are_gathered_in_inference_mode(tiny_llama: LlamaForCausalLM) -> None:
    """Threads do not inherit it, and stopped at the first tensor that was made in it."""
    with torch.inference_mode():
        inside = gathered(tiny_llama, windows_of(2))
    assert inside.n_tokens == gathered(tiny_llama, windows_of(2)).n_tokens
