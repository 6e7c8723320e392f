"""Floating-point quantizers against the value grids of their formats, written out from the published layouts."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from artifacts.codes import Codes
from artifacts.errors import NonFiniteError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.block_float import BlockFloat, BlockFormat
from artifacts.quantizers.float8 import DynamicFloat8, Float8, Float8Format
from artifacts.sites import Site
from calib.estimators import AnyEstimator, BlockFloatEstimator, Float8Estimator
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

pytestmark = pytest.mark.shapes

LAYOUTS = {"e4m3": (3, 7, 127), "e5m2": (2, 15, 124), "e2m1": (1, 1, 8)}
"""Bits of mantissa, bias of the exponent, and how many codes of one sign are finite."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_float8 = pytest.mark.parametrize("format", ["e4m3", "e5m2"])
every_block = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])


def grid(format: str) -> np.ndarray:
    """The finite values from zero up, in the order of their codes."""
    mantissa_bits, bias, n_codes = LAYOUTS[format]
    exponents, mantissas = np.divmod(np.arange(n_codes), 2**mantissa_bits)
    fractions = mantissas / 2**mantissa_bits
    return np.where(exponents, (1 + fractions) * 2.0 ** (exponents - bias), fractions * 2.0 ** (1 - bias))


def nearest(a: np.ndarray, format: str) -> np.ndarray:
    """Codes of the nearest finite values, of two equally near the even one, the sign bit on top."""
    values = grid(format)
    even_first = np.r_[0 : len(values) : 2, 1 : len(values) : 2]
    codes = even_first[np.abs(np.abs(a.astype(float))[..., None] - values[even_first]).argmin(-1)]
    return codes + np.signbit(a) * (8 if format == "e2m1" else 128)


def decoded(codes: np.ndarray, format: str) -> np.ndarray:
    sign_bit = 8 if format == "e2m1" else 128
    return np.where(codes >= sign_bit, -1.0, 1.0) * grid(format)[codes % sign_bit]


def hard_values(format: str) -> Tensor:
    """Every finite value, every middle between two and its neighbours, what is beyond, and random magnitudes."""
    values = torch.tensor(grid(format), dtype=torch.float32)
    middles = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    random = torch.exp(torch.empty(500).uniform_(-25, 12, generator=torch.Generator().manual_seed(0)))
    beyond = values[-1] * torch.tensor([1.01, 1.5, 1e3, 1e6])
    positive = torch.cat([values, middles, *near, random, beyond])
    return torch.cat([positive, -positive])


def normal(n_tokens: int = 50, channels: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n_tokens, channels, generator=generator) * torch.linspace(0.1, 5, channels)


def float8(channels: int = 64, scale: float = 0.05, format: Float8Format = "e4m3") -> Float8:
    return Float8(channels=channels, format=format, scale=torch.full((channels,), scale))


def block_float(format: BlockFormat, channels: int = 64, tensor_scale: float = 0.01) -> BlockFloat:
    scale = torch.tensor([tensor_scale]) if format == "nvfp4" else None
    return BlockFloat(channels=channels, format=format, tensor_scale=scale)


# ---- eight bits


@every_float8
@pytest.mark.parametrize("scale", [1.0, 0.0123, 3e4])
def test_float8_is_the_nearest_value_of_the_grid(format: Float8Format, scale: float) -> None:
    x = scale * hard_values(format)[:, None]
    quantizer = float8(1, scale, format)
    codes = nearest((x / scale).numpy(), format)
    assert np.array_equal(quantizer.encode(x).tensors["codes"].numpy(), codes)
    np.testing.assert_allclose(quantizer.simulate(x).numpy(), scale * decoded(codes, format), rtol=1e-6)


@every_dtype
@every_float8
def test_every_finite_float8_survives(format: Float8Format, dtype: torch.dtype) -> None:
    n_codes = LAYOUTS[format][2]
    patterns = torch.cat([torch.arange(n_codes), 128 + torch.arange(n_codes)]).to(torch.uint8)[:, None]
    quantizer = float8(1, 1.0, format)
    x = quantizer.decode(Codes(tensors={"codes": patterns}, shape=(len(patterns), 1), dtype=dtype))
    assert torch.equal(x[:n_codes, 0].double(), torch.from_numpy(grid(format)))
    assert torch.equal(quantizer.encode(x).tensors["codes"], patterns)


@every_dtype
@pytest.mark.parametrize(("format", "dtype8"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_scale_one_is_the_bare_cast(format: Float8Format, dtype8: torch.dtype, dtype: torch.dtype) -> None:
    x = normal().to(dtype)
    assert torch.equal(float8(64, 1.0, format).simulate(x), x.to(dtype8).to(dtype))


@every_float8
def test_float8_saturates(format: Float8Format) -> None:
    largest = 0.05 * float(grid(format)[-1])
    x = torch.tensor([[3.4e38, -3.4e38, 2 * largest, -1.2 * largest]])
    torch.testing.assert_close(float8(4, 0.05, format).simulate(x), largest * torch.tensor([[1.0, -1.0, 1.0, -1.0]]))


@every_float8
@pytest.mark.parametrize("size", [1.0, 1e3, 1e-3])
def test_float8_error_is_half_the_last_bit(format: Float8Format, size: float) -> None:
    mantissa_bits, bias, _ = LAYOUTS[format]
    x = size * normal()
    dynamic = DynamicFloat8(channels=64, format=format)
    scales = {float8(64, size, format): size, dynamic: dynamic.encode(x).tensors["scale"].float()}
    for quantizer, scale in scales.items():
        bound = torch.maximum(x.abs(), torch.as_tensor(scale * 2.0 ** (1 - bias))) * 2.0 ** -(mantissa_bits + 1)
        assert ((x - quantizer.simulate(x)).abs() <= 1.0001 * bound).all()


def test_values_are_far_out_by_their_channel_s_scale() -> None:
    quantizer = Float8(channels=2, scale=torch.tensor([1.0, 100.0]))
    assert quantizer.outlier_score(torch.tensor([[-4.0, 50.0]])).tolist() == [[4.0, 0.5]]


# ---- eight bits, scales of the tokens


@every_float8
@pytest.mark.parametrize("group_size", [None, 16])
def test_dynamic_float8_scale_is_the_least_that_holds_the_group(format: Float8Format, group_size: int | None) -> None:
    x = normal()
    scale = DynamicFloat8(channels=64, format=format, group_size=group_size).encode(x).tensors["scale"]
    needed = x.abs().unflatten(1, (-1, group_size or 64)).amax(2) / grid(format)[-1]
    assert (scale.shape, scale.dtype) == (needed.shape, torch.float16)
    assert (scale.float() >= needed * (1 - 1e-7)).all()
    below = (scale.view(torch.int16) - 1).view(torch.float16)
    assert (below.float() < needed).all()


def test_dynamic_float8_uses_the_scale_that_it_stores() -> None:
    quantizer, x = DynamicFloat8(channels=64, group_size=16), normal()
    codes = quantizer.encode(x)
    scale = codes.tensors["scale"].float().repeat_interleave(16, dim=1)
    assert np.array_equal(codes.tensors["codes"].numpy(), nearest((x / scale).numpy(), "e4m3"))


def test_groups_do_not_see_each_other() -> None:
    quantizer, x = DynamicFloat8(channels=64, group_size=16), normal()
    louder = torch.cat([1000 * x[:, :16], x[:, 16:]], dim=1)
    assert torch.equal(quantizer.simulate(louder)[:, 16:], quantizer.simulate(x)[:, 16:])
    whole = DynamicFloat8(channels=64)
    assert not torch.equal(whole.simulate(louder)[:, 16:], whole.simulate(x)[:, 16:])


def test_dynamic_float8_beyond_float16_scales_is_refused() -> None:
    quantizer = DynamicFloat8(channels=2)
    assert torch.isfinite(quantizer.simulate(torch.tensor([[2.9e7, 1.0]]))).all()
    with pytest.raises(NonFiniteError, match=r"^dynamic_float8: .*65504"):
        quantizer.encode(torch.tensor([[3e7, 1.0]]))


# ---- four bits


def naive_block(block: np.ndarray, format: str, tensor_scale: float) -> tuple[int, np.ndarray]:
    """The scale's byte and the decoded values of one block."""
    largest = np.abs(block).max()
    if format == "mxfp4":
        exponent = math.floor(math.log2(largest)) - 2
        byte, scale = exponent + 127, 2.0**exponent
    else:
        byte = int(nearest(np.maximum(largest / np.float32(6) / np.float32(tensor_scale), 2.0**-9), "e4m3"))
        scale = tensor_scale * grid("e4m3")[byte]
    return byte, scale * decoded(nearest(block.astype(float) / scale, "e2m1"), "e2m1")


@every_block
@pytest.mark.parametrize("channels", [64, 40, 7])
def test_blocks_are_the_naive_ones(format: BlockFormat, channels: int) -> None:
    """At 40 and 7 channels the last block is shorter."""
    quantizer, x = block_float(format, channels), 3 * normal(20, channels)
    codes, y = quantizer.encode(x), quantizer.simulate(x)
    size = {"mxfp4": 32, "nvfp4": 16}[format]
    assert codes.tensors["scale"].shape == (20, -(-channels // size))
    for token in range(20):
        for j, start in enumerate(range(0, channels, size)):
            block = x[token, start : start + size].numpy()
            byte, values = naive_block(block, format, 0.01)
            assert codes.tensors["scale"][token, j] == byte
            np.testing.assert_allclose(y[token, start : start + size].numpy(), values, rtol=1e-6)


def test_elements_are_the_nearest_values_of_the_grid() -> None:
    """Blocks of hard values, each with a 6 that fixes the scale at 1."""
    a = hard_values("e2m1").clamp(-7.9, 7.9)
    x = torch.cat([torch.full((len(a), 1), 6.0), a[:, None]], dim=1)
    codes = block_float("mxfp4", 2).encode(x).tensors
    assert (codes["scale"] == 127).all()
    assert np.array_equal(codes["codes"][:, 0].numpy() >> 4, nearest(a.numpy(), "e2m1"))
    assert sorted(set(decoded(nearest(a.numpy(), "e2m1"), "e2m1"))) == [
        *(-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0),
        *(0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    ]


@every_block
def test_every_element_and_scale_survives(format: BlockFormat) -> None:
    scales = torch.arange(0, 253) if format == "mxfp4" else torch.arange(1, 127)
    elements = (torch.arange(8) * 2 + 16 * (torch.arange(8) * 2 + 1)).to(torch.uint8)  # codes 0 to 15 in order
    tensors = {"codes": elements.expand(len(scales), 8), "scale": scales.to(torch.uint8)[:, None]}
    quantizer = block_float(format, 16, 0.013)
    x = quantizer.decode(Codes(tensors=tensors, shape=(len(scales), 16), dtype=torch.float32))
    again = quantizer.encode(x).tensors
    assert torch.equal(again["scale"], tensors["scale"])
    assert torch.equal(again["codes"], tensors["codes"])


@pytest.mark.parametrize("exponent", [-120, -30, -1, 0, 1, 2, 7, 126])
def test_mx_scale_steps_at_powers_of_two(exponent: int) -> None:
    power = torch.tensor([[2.0**exponent]])
    below = torch.nextafter(power, torch.zeros(1))
    for x, expected in ((power, exponent - 2), (below, exponent - 3), (1.99 * power, exponent - 2)):
        assert int(block_float("mxfp4", 1).encode(x).tensors["scale"]) == expected + 127


def test_mx_scale_ends_where_its_byte_does() -> None:
    x = torch.tensor([[1e-45], [2.0**-125], [2.0**-124], [3.4e38]])
    assert block_float("mxfp4", 1).encode(x).tensors["scale"][:, 0].tolist() == [0, 0, 1, 252]


def test_powers_of_two_come_back_from_mxfp4_exactly() -> None:
    x = torch.ldexp(torch.ones(200), torch.arange(-100, 100))[:, None] * torch.tensor([1.0, 0.5, -0.25, 1.5])
    assert torch.equal(block_float("mxfp4", 4).simulate(x), x)


def test_mxfp4_saturates_between_six_and_eight() -> None:
    assert block_float("mxfp4", 3).simulate(torch.tensor([[7.9, -6.5, 5.1]])).tolist() == [[6.0, -6.0, 6.0]]


def test_nvfp4_scales_are_two_fold() -> None:
    """The block with the site's largest value has the largest float8, others their share of it."""
    x = normal()
    x[0, 0] = 100.0
    quantizer = block_float("nvfp4", tensor_scale=100 / (6 * 448))
    scale = quantizer.encode(x).tensors["scale"]
    assert int(scale[0, 0]) == 126
    assert quantizer.simulate(x)[0, 0] == pytest.approx(100, rel=1e-6)
    share = x.abs().unflatten(1, (-1, 16)).amax(2) / 100 * 448
    np.testing.assert_allclose(grid("e4m3")[scale.numpy()], share.numpy(), rtol=2**-4)
    doubled = block_float("nvfp4", tensor_scale=200 / (6 * 448))
    assert torch.equal(doubled.simulate(2 * x), 2 * quantizer.simulate(x))


def test_nvfp4_saturates_beyond_the_site_s_largest_value() -> None:
    x = torch.tensor([[3.4e38, -1.0, -3.4e38, 0.0]])
    expected = torch.tensor([[1.0, 0.0, -1.0, 0.0]]) * (0.01 * 6 * 448)
    torch.testing.assert_close(block_float("nvfp4", 4).simulate(x), expected)


def test_nvfp4_blocks_far_below_the_site_s_largest_value_keep_a_scale() -> None:
    x = torch.tensor([[1e-30, 0.0], [0.01 * 2**-9, -0.01 * 2**-8]])
    assert torch.equal(block_float("nvfp4", 2).simulate(x), torch.tensor([[0.0, 0.0], x[1].tolist()]))
    assert (block_float("nvfp4", 2).encode(x).tensors["scale"] == 1).all()


# ---- all of them


@pytest.mark.parametrize(
    ("quantizer", "bits_per_element"),
    [
        (float8(), 8.0),
        (float8(format="e5m2"), 8.0),
        (DynamicFloat8(channels=64), 8.0 + 16 / 64),
        (DynamicFloat8(channels=64, group_size=16), 8.0 + 16 / 16),
        (block_float("mxfp4"), 4.25),
        (block_float("nvfp4"), 4.5),
    ],
    ids=lambda value: value.spec.describe() if isinstance(value, Quantizer) else "",
)
def test_bits_per_element(quantizer: Quantizer, bits_per_element: float) -> None:
    assert quantizer.encode(normal().half()).nbytes * 8 == bits_per_element * normal().numel()


def test_what_costs_more_bits_errs_less() -> None:
    x = normal(500)
    ordered = [
        DynamicFloat8(channels=64, group_size=16),
        DynamicFloat8(channels=64, format="e5m2"),
        block_float("nvfp4", tensor_scale=float(x.abs().max()) / (6 * 448)),
        block_float("mxfp4"),
    ]
    errors = [float((x - quantizer.simulate(x)).square().mean()) for quantizer in ordered]
    assert errors == sorted(errors)


@every_dtype
@pytest.mark.parametrize(
    "quantizer", [float8(), DynamicFloat8(channels=64), block_float("mxfp4"), block_float("nvfp4")]
)
def test_zeros_come_back_exactly_and_both_signs_alike(quantizer: Quantizer, dtype: torch.dtype) -> None:
    zeros, x = torch.zeros(3, 64, dtype=dtype), normal().to(dtype)
    assert torch.equal(quantizer.simulate(zeros), zeros)
    assert torch.equal(quantizer.simulate(-x), -quantizer.simulate(x))


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Float8(channels=2, scale=torch.tensor([1.0, 0.0])), "scale must be finite and positive; 1 of 2"),
        (lambda: Float8(channels=2, scale=torch.tensor([1.0, 1e38])), r"scale \* largest float8 must be finite; 1 of"),
        (lambda: DynamicFloat8(channels=6, group_size=4), "group_size must divide the 6 channels; got 4"),
        (lambda: DynamicFloat8(channels=6, group_size=0), "group_size must be an integer from 1; got 0"),
        (lambda: BlockFloat(channels=6, format="nvfp4"), "got none for nvfp4"),
        (lambda: BlockFloat(channels=6, tensor_scale=torch.ones(1)), "got one for mxfp4"),
        (lambda: block_float("nvfp4", tensor_scale=0.0), "tensor_scale must be finite and positive"),
        (lambda: block_float("nvfp4", tensor_scale=-1.0), "tensor_scale must be finite and positive"),
        (lambda: block_float("nvfp4", tensor_scale=1e-44), r"tensor_scale \* 0.00195312 must be finite and positive"),
        (lambda: block_float("nvfp4", tensor_scale=1e36), r"tensor_scale \* 2688 must be finite and positive"),
    ],
)
def test_settings_are_checked_when_built(construct: Callable[[], Quantizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        construct()


# ---- estimators

HEADS, HEAD_DIM = 4, 16
Sharing = Literal["tensor", "head", "channel"]


def statistics_of(x: Tensor) -> SiteStatistics:
    statistics = SiteStatistics(SiteShape(site=Site(0, "value"), heads=HEADS, head_dim=HEAD_DIM), "basic")
    statistics.update(x)
    return statistics


def awkward() -> Tensor:
    """A head of zeros, a constant channel of each sign, a channel that is never positive."""
    x = normal()
    x[:, :HEAD_DIM] = 0
    x[:, 20], x[:, 21], x[:, 22] = 0.1, -7.7, -x[:, 22].abs()  # 7.7 / 448 * 448 is not 7.7 in float32
    return x


@every_float8
@pytest.mark.parametrize(("sharing", "shared"), [("tensor", 64), ("head", 16), ("channel", 1)])
def test_fitted_scale_is_the_largest_magnitude_over_the_largest_float8(
    format: Float8Format, sharing: Sharing, shared: int
) -> None:
    x = normal()
    fit = Float8Estimator(format=format, scale=sharing).fit(statistics_of(x))
    largest = np.abs(x.numpy()).max(axis=0).reshape(-1, shared).max(axis=1).repeat(shared)
    assert isinstance(fit.quantizer, Float8)
    assert (fit.quantizer.format, fit.source) == (format, "exact statistics")
    np.testing.assert_allclose(fit.quantizer.scale.numpy(), largest / grid(format)[-1], rtol=1e-6)
    assert fit.quantizer.scale.unique().numel() == 64 // shared


@every_float8
@pytest.mark.parametrize("sharing", ["tensor", "head", "channel", "token", "head_token", "one"])
def test_zero_and_constant_channels_come_back(format: Float8Format, sharing: str) -> None:
    x = awkward()
    y = TypeAdapter(AnyEstimator).validate_python({"method": "float8", "format": format, "scale": sharing})
    y = y.fit(statistics_of(x)).quantizer.simulate(x)
    assert torch.equal(y[:, :HEAD_DIM], x[:, :HEAD_DIM])
    assert ((y - x).abs() <= x.abs() * 2.0 ** -(LAYOUTS[format][0] + 1) + 0.001).all()
    if sharing == "channel":
        assert torch.equal(y[:, 20:22], x[:, 20:22])


def test_tiny_channels_keep_a_scale() -> None:
    x = torch.full((5, 64), 1e-40) * torch.arange(1, 6)[:, None]
    for estimator in (Float8Estimator(scale="channel"), BlockFloatEstimator(format="nvfp4")):
        assert torch.isfinite(estimator.fit(statistics_of(x)).quantizer.simulate(x)).all()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("token", DynamicFloat8(channels=64)),
        ("head_token", DynamicFloat8(channels=64, group_size=HEAD_DIM)),
        ("one", float8(scale=1.0)),
    ],
)
def test_what_needs_no_calibration_is_the_same_without(
    scale: Literal["token", "head_token", "one"], expected: Quantizer
) -> None:
    statistics, estimator = statistics_of(normal()), Float8Estimator(scale=scale)
    for quantizer in (estimator.fit(statistics).quantizer, estimator.dynamic(statistics.shape)):
        assert quantizer.spec == expected.spec
        assert torch.equal(quantizer.simulate(normal()), expected.simulate(normal()))


@pytest.mark.parametrize("estimator", [Float8Estimator(), BlockFloatEstimator(format="nvfp4")])
def test_what_is_fitted_asks_for_calibration(estimator: Float8Estimator | BlockFloatEstimator) -> None:
    with pytest.raises(ValueError, match="calibrate first, or use"):
        estimator.dynamic(statistics_of(normal()).shape)


def test_block_floats_are_fitted_by_the_largest_magnitude_or_not_at_all() -> None:
    x = awkward()
    statistics = statistics_of(x)
    nvfp4 = BlockFloatEstimator(format="nvfp4").fit(statistics).quantizer
    assert float(nvfp4.tensors()["tensor_scale"]) == pytest.approx(float(x.abs().max()) / (6 * 448), rel=1e-6)
    mxfp4 = BlockFloatEstimator().fit(statistics).quantizer
    assert mxfp4.tensors() == {}
    assert mxfp4.spec == BlockFloatEstimator().dynamic(statistics.shape).spec
    assert BlockFloatEstimator(format="nvfp4").fit(statistics_of(0 * x)).quantizer.simulate(0 * x).any() == 0
