"""Published systems in a few lines each, written from their descriptions, against the recipes that stand for them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook
from artifacts.quantizers.sparse import AbstractSparse
from artifacts.sites import Site
from calib.estimators import UniformEstimator
from calib.estimators.codebook_levels import fixed_levels, lloyd_max
from calib.recipe.recipe import load_recipe
from calib.statistics.row_sample import RowSample, priorities
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

pytestmark = pytest.mark.shapes

KEY, VALUE = Site(0, "key", "pre_rope"), Site(0, "value")
CHANNELS = 64


def activations(n_tokens: int = 320) -> Tensor:
    """Channels of different spreads and offsets, a few values far out."""
    x = torch.randn(n_tokens, CHANNELS) * torch.linspace(0.2, 4, CHANNELS) + torch.linspace(-2, 2, CHANNELS)
    return torch.where(torch.rand(x.shape) < 0.01, 5 * x, x)


def fitted(name: str, site: Site, x: Tensor) -> Quantizer:
    """The quantizer of a shipped recipe, fitted to `x` with queries that read all channels alike."""
    shape = SiteShape(site=site, heads=2, head_dim=CHANNELS // 2)
    statistics, sample = SiteStatistics(shape, "basic"), RowSample(1024)
    statistics.update(x)
    statistics.keep_rows(x, sample.choose(priorities(0, torch.arange(len(x))), torch.arange(len(x))))
    if site.tensor == "key":
        statistics.query_energy = torch.ones(CHANNELS, dtype=torch.float64)
        statistics.query_metric = torch.eye(CHANNELS // 2, dtype=torch.float64).expand(2, -1, -1)
    recipe = load_recipe(name)
    return (recipe.key if site.tensor == "key" else recipe.value).fit(statistics).quantizer


# KVQuant


def kvquant_integer(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """q = clip(round(qx y - off)), y' = (q + off) / qx, with the offset neither rounded nor clamped."""
    qx = (2**bits - 1) / (high - low)
    off = low * qx
    return ((qx * x - off).round().clamp(0, 2**bits - 1) + off) / qx


def test_kvquant_keys_on_a_uniform_grid() -> None:
    x = activations()
    low, high = x.amin(dim=0).half().float(), x.amax(dim=0).half().float()
    expected = kvquant_integer(x, low, high, 4)
    torch.testing.assert_close(fitted("kvquant", KEY, x).simulate(x), expected, rtol=1e-4, atol=1e-4)


def test_kvquant_values_on_a_uniform_grid() -> None:
    x = activations()
    expected = kvquant_integer(x, x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True), 4)
    step = (x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)) / 15
    gap = (fitted("kvquant", VALUE, x).simulate(x) - expected).abs() / step
    assert (gap > 0.51).double().mean() < 0.01  # a code may differ where rounding the range to 16 bits moved a boundary
    assert gap.max() < 1.02


def kvquant_codebook(x: Tensor, quantizer: Quantizer) -> Tensor:
    """(y - z) / r to the nearest pole, outliers beyond the thresholds exact, then r q + z."""
    assert isinstance(quantizer, AbstractSparse)
    assert isinstance(quantizer.inner, Codebook)
    lower, upper = quantizer.lower.half(), quantizer.upper.half()
    z, r = ((upper + lower) / 2).float(), ((upper - lower) / 2).float()
    poles = quantizer.inner.levels[0].float()
    nearest = poles[(((x - z) / r)[..., None] - poles).abs().argmin(dim=-1)]
    outlier = (x < lower.float()) | (x > upper.float())
    return torch.where(outlier, x.half().float(), nearest * r + z)


def test_kvquant_keys_through_a_codebook_with_outliers() -> None:
    x = activations()
    quantizer = fitted("kvquant-3-1pct", KEY, x)
    torch.testing.assert_close(quantizer.simulate(x), kvquant_codebook(x, quantizer), rtol=1e-5, atol=1e-5)
    expected = np.percentile(x.numpy(), [0.5, 99.5], axis=0).astype(np.float32)
    torch.testing.assert_close(
        torch.stack([quantizer.lower, quantizer.upper]), torch.from_numpy(expected).half().float(), rtol=1e-3, atol=1e-3
    )


def test_qnorm_gives_decoded_values_the_moments_of_the_normalised_ones() -> None:
    x = activations(2000)
    plain, normed = (fitted(name, KEY, x) for name in ("kvquant-2-1pct", "kvquant-2-1pct-qnorm"))
    inner = normed.inner
    a = (x - inner.offset) / inner.scale
    inside = a.abs() <= 1
    decoded = ((normed.simulate(x) - inner.offset) / inner.scale)[inside]
    assert float(decoded.std()) == pytest.approx(float(a[inside].std()), rel=0.02)
    assert float(decoded.mean()) == pytest.approx(float(a[inside].mean()), abs=0.01)
    assert torch.equal(normed.encode(x).inner.tensors["codes"], plain.encode(x).inner.tensors["codes"])


@pytest.mark.parametrize(
    ("bits", "levels"),
    [
        (2, [-1, 0, 0.337915, 1]),
        (3, [-1, -0.478629, -0.217142, 0, 0.16093, 0.337915, 0.562617, 1]),
    ],
)
def test_normal_float_levels(bits: int, levels: list[float]) -> None:
    torch.testing.assert_close(
        fixed_levels("normal_float", 2**bits), torch.tensor(levels, dtype=torch.float64), rtol=0, atol=1e-6
    )


# KIVI


def kivi(x: Tensor, bits: int, dim: int) -> Tensor:
    """Groups of 32 along `dim`: scale = (max - min) / (2^b - 1), q = round(clamp((x - min) / scale)), in 16 bits."""
    groups = x.unflatten(dim, (-1, 32))
    low, high = groups.amin(dim + 1, keepdim=True), groups.amax(dim + 1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return (((groups - low) / scale).clamp(0, 2**bits - 1).round() * scale + low).flatten(dim, dim + 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("site", "dim"), [(Site(0, "key", "post_rope"), 0), (VALUE, 1)])
def test_kivi_groups(bits: int, site: Site, dim: int) -> None:
    x = activations().half().float()
    groups = x.unflatten(dim, (-1, 32))
    step = (groups.amax(dim + 1) - groups.amin(dim + 1)).repeat_interleave(32, dim) / (2**bits - 1)
    gap = (fitted(f"kivi-{bits}", site, x).simulate(x) - kivi(x, bits, dim)).abs() / step
    tolerance = (2**bits - 1) * 2**-11  # of rounding the step to 16 bits
    assert (gap > 0.01 + 2 * tolerance).double().mean() < 0.005 * 2**bits / 4
    assert gap.max() < 1.02 + 2 * tolerance


# msModelSlim


@pytest.mark.parametrize("symmetric", [True, False])
def test_msmodelslim_scale_and_offset(symmetric: bool) -> None:
    x = activations()
    statistics = SiteStatistics(SiteShape(site=Site(0, "key", "post_rope"), heads=2, head_dim=32), "basic")
    statistics.update(x)
    quantizer = UniformEstimator(bits=8, per="channel", symmetric=symmetric).fit(statistics).quantizer
    assert isinstance(quantizer, Affine)
    low, high = x.amin(dim=0).clamp_max(0), x.amax(dim=0).clamp_min(0)
    if symmetric:
        scale, offset = torch.maximum(-low, high) / 127, torch.zeros(CHANNELS)
        torch.testing.assert_close(quantizer.scale, scale)
    else:  # theirs must hold zero and has a whole offset: never finer than ours
        scale = high / 255 - low / 255
        offset = (-low / scale).round() - 128
        assert (quantizer.scale <= scale * (1 + 1e-6)).all()
    theirs = ((x / scale + offset).round().clamp(-128, 127) - offset) * scale
    assert ((quantizer.simulate(x) - theirs).abs() <= scale * (0.501 if symmetric else 1.01)).all()


def test_the_first_of_two_batches_counts() -> None:
    """msModelSlim keeps the last batch only."""
    x = activations()
    statistics = SiteStatistics(SiteShape(site=Site(0, "key", "post_rope"), heads=2, head_dim=32), "basic")
    for batch in (10 * x, x):
        statistics.update(batch)
    quantizer = load_recipe("int8-per-channel").key.fit(statistics).quantizer
    torch.testing.assert_close(quantizer.scale, 10 * x.abs().amax(dim=0) / 127)


def test_groups_far_from_zero_keep_half_a_step() -> None:
    """KIVI for Qwen clamped its zero point: N(5, 0.1) came back 4.58 off."""
    x = 5 + 0.1 * torch.randn(64, 64)
    steps = (x.view(2, 32, 64).amax(dim=1) - x.view(2, 32, 64).amin(dim=1)).repeat_interleave(32, 0) / 3
    error = (fitted("kivi-2", Site(0, "key", "post_rope"), x).simulate(x) - x).abs()
    assert (error <= steps / 2 + 5 * 2**-10).all()


def test_codebooks_are_in_the_units_of_the_data() -> None:
    """LLaMA3-simquant fitted raw values and decoded normalised ones: squared error 13.09 on N(0, 9) at 3 bits."""
    x = 3 * torch.randn(4000, CHANNELS)
    for site in (KEY, VALUE):
        assert float((fitted("kvquant-3", site, x).simulate(x) - x).square().mean()) < 0.06 * 9


# TurboQuant


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03455), (4, 0.009501)])
def test_gaussian_tables_have_the_known_distortion(bits: int, distortion: float) -> None:
    x = torch.randn(10**6, dtype=torch.float64)
    levels = lloyd_max("gaussian", 2**bits)
    nearest = levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    assert float((x - nearest).square().mean()) == pytest.approx(distortion, rel=0.01)


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.5), (2, 0.1762), (3, 0.05448), (4, 0.01537)])
def test_laplace_tables_have_the_known_distortion(bits: int, distortion: float) -> None:
    x = torch.distributions.Laplace(0.0, 0.5**0.5).sample((10**6,)).double()
    levels = lloyd_max("laplace", 2**bits)
    nearest = levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    assert float((x - nearest).square().mean()) == pytest.approx(distortion, rel=0.015)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turboquant_on_any_direction(bits: int) -> None:
    """Its distortion is that of a Gaussian, whatever the vectors, and the norm of every head survives."""
    x = activations(500) ** 3
    quantizer = load_recipe(f"turboquant-{bits}").key.dynamic(SiteShape(site=KEY, heads=2, head_dim=32))
    decoded = quantizer.simulate(x)
    heads, again = (y.view(500, 2, 32) for y in (x, decoded))
    torch.testing.assert_close(heads.norm(dim=2), again.norm(dim=2), rtol=2e-3, atol=0)
    relative = float(((heads - again).norm(dim=2) / heads.norm(dim=2)).square().mean())
    assert relative < 1.6 * {2: 0.1175, 3: 0.03455, 4: 0.009501}[bits]
