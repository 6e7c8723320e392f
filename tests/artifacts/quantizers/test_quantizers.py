"""Every quantizer against the contract, then what each promises beyond it.

A new method is one row in `QUANTIZERS` of `helpers/quantizers.py`; the completeness test fails until it is there.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.contract import every_check, every_check_by_dtype
from helpers.quantizers import (
    QUANTIZERS,
    SITE,
    affine,
    assert_same,
    chain,
    codebook,
    dynamic,
    dynamic_codebook,
    every_dtype,
    every_quantizer,
    make,
    mixed_codebook,
    normal_levels,
    rank,
    symmetric,
    tokens,
)
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.packing import pack, packed_bytes, unpack
from artifacts.errors import NonFiniteError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook, codes_of, look_up
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.predicted import Predicted
from artifacts.quantizers.sparse import AbstractSparse, PercentileSparse, RankSparse, ThresholdSparse
from artifacts.registry import KINDS, build
from artifacts.sites import Site
from artifacts.spec import QuantSpec

pytestmark = pytest.mark.shapes

# ---- the contract


@every_check
@every_quantizer
def test_check(name: str, check: Callable[[str], None]) -> None:
    check(name)


@every_dtype
@every_check_by_dtype
@every_quantizer
def test_check_by_dtype(name: str, check: Callable[[str, torch.dtype], None], dtype: torch.dtype) -> None:
    check(name, dtype)


def test_every_kind_stands_in_the_matrix() -> None:
    used = {type(part) for name in QUANTIZERS for part in chain(make(name))}
    assert used == set(KINDS.values()) - {Predicted}, "whose context is given to it in `test_predictive.py`"
    assert all(KINDS[name].kind == name for name in KINDS)


@every_quantizer
def test_check_spec_and_tensors_rebuild_it(name: str) -> None:
    quantizer, x = make(name).at(SITE), tokens(6)
    text = json.dumps(quantizer.spec.to_json())
    spec = QuantSpec.from_json(json.loads(text))
    assert spec == quantizer.spec
    rebuilt = build(spec, {key: tensor.clone() for key, tensor in quantizer.tensors().items()}, SITE)
    assert rebuilt.spec == quantizer.spec
    assert torch.equal(rebuilt.simulate(x), quantizer.simulate(x))
    # What was encoded by one is decoded by the other: Codes and the file are all that decoding reads.
    assert torch.equal(rebuilt.decode(quantizer.encode(x)), quantizer.simulate(x))


@every_quantizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_non_finite_values_are_refused(name: str, bad: float) -> None:
    x = tokens(3)
    x[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"^layers\.3\.key\.pre_rope: 1 of 72 values"):
        make(name).at(SITE).encode(x)


@every_quantizer
def test_check_a_site_is_given_to_all_parts(name: str) -> None:
    assert [part.site for part in chain(make(name).at(SITE))] == [SITE for _ in chain(make(name))]


@every_quantizer
def test_check_moving_to_its_own_device_changes_nothing(name: str) -> None:
    quantizer, x = make(name).at(SITE), tokens(4)
    moved = quantizer.to(torch.device("cpu"))
    again = moved.to(torch.device("cpu"))
    assert moved is quantizer, "with all that it has worked out"
    assert quantizer.at(SITE) is quantizer
    for other in (moved, again):
        assert (other.spec, other.site) == (quantizer.spec, SITE)
        assert_same(other.tensors(), quantizer.tensors())
    assert torch.equal(again.simulate(x), quantizer.simulate(x))


@every_quantizer
def test_check_a_copy_elsewhere_is_not_checked_again(name: str) -> None:
    """Each move asked every tensor whether it is finite, which is a wait for the device; `meta` cannot answer."""
    quantizer = make(name).at(SITE)
    quantizer.simulate(tokens(4))
    there = quantizer.to(torch.device("meta"))
    assert (there.spec, there.site) == (quantizer.spec, SITE)
    assert all(tensor.is_meta for tensor in there.tensors().values())
    own = vars(there).values() if quantizer.tensors() else ()
    assert all(value.is_meta for value in own if isinstance(value, Tensor)), "nothing worked out stays behind"


@every_dtype
@every_quantizer
@pytest.mark.parametrize("size", [1e4, 1e-6, 0.0])
def test_check_huge_and_tiny_values(name: str, dtype: torch.dtype, size: float) -> None:
    quantizer = make(name)
    x = (tokens(5).clamp(-3, 3) * size).to(dtype)
    assert torch.isfinite(quantizer.simulate(x)).all()


@every_quantizer
def test_check_the_largest_halves_stay_finite(name: str) -> None:
    """A range rounded outwards ends beyond the largest float16; what is read back must not."""
    x = torch.tensor([[65504.0, -65504.0, 1.0, 0.0] * 6, [65504.0, 0.0, 1.0, 2.0] * 6]).half()
    for bits in (2, 4, 8):
        try:
            y = make(name, bits=bits).simulate(x)
        except NonFiniteError:
            assert "dynamic" in name, "only what stores its range in float16 may refuse"
        else:
            assert torch.isfinite(y).all()


# ---- uniform


AFFINE = [name for name in QUANTIZERS if isinstance(make(name), Affine | DynamicAffine)]


def grid(quantizer: Affine | DynamicAffine, codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """The step that was stored, and the ends of the range."""
    stored = {**quantizer.tensors(), **codes.tensors}
    scale = stored["scale"].float()
    centred = "offset" not in stored
    low = -(2 ** (quantizer.bits - 1) - 1) * scale if centred else stored["offset"].float()
    high = -low if centred else low + (2**quantizer.bits - 1) * scale
    return tuple(everywhere(quantizer, end, codes.shape[0]) for end in (scale, low, high))


def everywhere(quantizer: Affine | DynamicAffine, parameter: Tensor, n_tokens: int) -> Tensor:
    """A parameter of each group, at each of its values."""
    size = getattr(quantizer, "group_size", None)
    if size is None:
        return parameter
    if quantizer.per == "token":
        return parameter.repeat_interleave(size, dim=1)
    return parameter.repeat_interleave(size, dim=0)[:n_tokens]


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e-6])
def test_error_in_range_is_half_a_step(name: str, bits: int, size: float) -> None:
    quantizer, x = make(name, bits=bits), tokens(50) * size
    codes = quantizer.encode(x)
    scale, low, high = grid(quantizer, codes)
    rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(x.abs(), low.abs())
    inside = (x >= low - rounding) & (x <= high + rounding)
    assert ((x - quantizer.decode(codes)).abs() <= scale / 2 + rounding)[inside].all()
    if isinstance(quantizer, DynamicAffine) and not quantizer.whole_zero_point and quantizer.clip_ratio is None:
        assert inside.all(), "the stored range must hold every value"


@pytest.mark.parametrize("name", AFFINE)
def test_values_out_of_range_saturate(name: str) -> None:
    quantizer = make(name)
    if isinstance(quantizer, Affine):
        x = torch.full((2, 24), 1e6) * torch.tensor([[1.0], [-1.0]])
        _, low, high = grid(quantizer, quantizer.encode(x))
        torch.testing.assert_close(quantizer.simulate(x), torch.stack([high, low]))


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n.startswith("dynamic")])
def test_dynamic_parameters_are_used_as_stored(name: str) -> None:
    quantizer, x = make(name), tokens(9)
    codes = quantizer.encode(x)
    parameters = {key: tensor for key, tensor in codes.tensors.items() if key != "codes"}
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float16}
    shapes = {
        "dynamic-per-channel": (1, 24),
        "dynamic-per-tensor": (1, 1),
        "dynamic-groups": (9, 6),
        "dynamic-groups-of-tokens": (3, 24),
    }
    shape = shapes.get(name, (9, 1))
    assert {tuple(tensor.shape) for tensor in parameters.values()} == {shape}
    doubled = {key: 2 * tensor for key, tensor in parameters.items()}
    changed = replace(codes, tensors={**codes.tensors, **doubled})
    assert torch.equal(quantizer.decode(changed), 2 * quantizer.decode(codes))


@pytest.mark.parametrize("name", ["dynamic", "dynamic-symmetric", "dynamic-codebook"])
@pytest.mark.parametrize("wrap", [lambda inner: inner, rank], ids=["bare", "wrapped"])
def test_ranges_beyond_float16_are_refused(name: str, wrap: Callable[[Quantizer], Quantizer]) -> None:
    quantizer = wrap(make(name)).at(SITE)
    with pytest.raises(NonFiniteError, match=r"^layers\.3\.key\.pre_rope: .*65504"):
        quantizer.encode(torch.full((2, 24), 1e6))


@every_dtype
@pytest.mark.parametrize("name", ["dynamic", "dynamic-per-channel", "percentile-dynamic", "identity"])
@pytest.mark.parametrize("value", [0.0, 0.3125, -7.5, 4096.0])
def test_constant_tokens_come_back_exactly(name: str, value: float, dtype: torch.dtype) -> None:
    x = torch.full((3, 24), value, dtype=dtype)
    assert torch.equal(make(name).simulate(x), x)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_constant_channels_come_back_exactly(bits: int) -> None:
    value = torch.tensor([0.1, -3.7, 0.0, 1e4, 1e-6])
    constant = torch.ones(5)
    levels = torch.cat([torch.zeros(1), torch.arange(1, 2**bits)]).half()[None]
    for quantizer in (
        Affine(channels=5, bits=bits, scale=constant, offset=value),
        Codebook(channels=5, bits=bits, scale=constant, offset=value, levels=levels),
    ):
        assert torch.equal(quantizer.simulate(value.expand(4, 5)), value.expand(4, 5))


def test_whole_zero_points_are_whole() -> None:
    codes = dynamic(24, 4, whole_zero_point=True).encode(tokens(40))
    zero_point = -codes.tensors["offset"].float() / codes.tensors["scale"].float()
    torch.testing.assert_close(zero_point, zero_point.round(), rtol=0, atol=15 * 2**-10)
    assert (zero_point.round() >= 0).all()
    assert (zero_point.round() <= 15).all()


def test_symmetric_quantizers_treat_both_signs_alike() -> None:
    x = tokens(20)
    for quantizer in (symmetric(24), dynamic(24, symmetric=True)):
        assert torch.equal(quantizer.simulate(-x), -quantizer.simulate(x))
    torch.testing.assert_close(symmetric(24).outlier_score(-x), symmetric(24).outlier_score(x))
    assert torch.equal(symmetric(24).simulate(torch.zeros(2, 24)), torch.zeros(2, 24))


# ---- codebooks


def nearest(a: Tensor, levels: Tensor) -> Tensor:
    """For each value the level at the least distance, of equals the lower."""
    tables = levels.double().expand(a.shape[1], -1)
    return torch.stack([(a[:, j, None].double() - tables[j]).abs().argmin(-1) for j in range(a.shape[1])], dim=1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tables", [1, 7])
def test_nearest_level_is_the_argmin(bits: int, tables: int) -> None:
    levels = normal_levels(bits, tables)
    wide = levels.float().expand(7, -1)
    midpoints = ((wide[:, 1:] + wide[:, :-1]) / 2).T
    a = torch.cat([0.7 * torch.randn(200, 7), wide.T, midpoints])  # the last rows are ties
    assert torch.equal(codes_of(a, levels).long(), nearest(a, levels))


@pytest.mark.parametrize("bits", [2, 6])
def test_equal_levels_are_harmless(bits: int) -> None:
    levels = torch.cat([torch.zeros(2**bits - 1), torch.ones(1)]).half()[None]
    a = torch.tensor([[-1.0, 0.0, 0.4, 0.6, 2.0]])
    assert look_up(levels, codes_of(a, levels)).tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0]]


def test_codebook_error_is_half_the_widest_gap() -> None:
    quantizer = codebook(24)
    x = tokens(50)
    a = (x - quantizer.offset) / quantizer.scale
    inside = a.abs() <= 1
    gap = quantizer.levels.float().diff(dim=1).max() * quantizer.scale
    assert ((x - quantizer.simulate(x)).abs() <= 0.5001 * gap)[inside].all()


# ---- outliers


def outliers(quantizer: ThresholdSparse | PercentileSparse | RankSparse, x: Tensor) -> Tensor:
    """The mask as the stored counts and indices tell it."""
    codes = quantizer.encode(x)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    rows = torch.arange(len(x)).repeat_interleave(quantizer._counts(codes))
    mask[rows, codes.tensors["indices"].long()] = True
    return mask


SPARSE = [name for name in QUANTIZERS if isinstance(make(name), AbstractSparse)]


@every_dtype
@pytest.mark.parametrize("channels", [24, 300])
@pytest.mark.parametrize("name", SPARSE)
def test_outliers_come_back_rounded_to_half(name: str, channels: int, dtype: torch.dtype) -> None:
    quantizer, x = make(name, channels), tokens(30, channels, dtype)
    mask = outliers(quantizer, x)
    assert mask.any()
    kept = x[mask].half().float() if dtype == torch.float32 else x[mask].float()
    assert torch.equal(quantizer.simulate(x)[mask].float(), kept)
    assert torch.equal(mask, quantizer.mask(x.float()))


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_no_outlier_is_quantized_without_them(name: str) -> None:
    """Outliers, however far out, change nothing for the rest of their token."""
    quantizer, x = make(name), tokens(30)
    mask = quantizer.mask(x)
    further = torch.where(mask, 20 * x, x)
    if torch.equal(quantizer.mask(further), mask):
        assert torch.equal(quantizer.simulate(further)[~mask], quantizer.simulate(x)[~mask])


def test_outliers_beyond_float16_are_refused() -> None:
    x = tokens(2)
    x[0, 0] = 1e6
    with pytest.raises(NonFiniteError, match=r"^layers\.3\.key\.pre_rope: an outlier of 1e\+06"):
        rank(affine(24)).at(SITE).encode(x)


@pytest.mark.parametrize("outliers_per_token", [1, 4, 23])
@pytest.mark.parametrize("inner", [affine(24), symmetric(24), codebook(24), dynamic(24)], ids=lambda q: q.kind)
def test_rank_keeps_exactly_k(inner: Quantizer, outliers_per_token: int) -> None:
    quantizer = RankSparse(channels=24, inner=inner, outliers_per_token=outliers_per_token)
    for x in (tokens(40), torch.randint(-2, 3, (40, 24)).float(), torch.ones(3, 24)):
        order = inner.outlier_score(x).sort(dim=1, descending=True, stable=True).indices
        expected = torch.zeros(x.shape, dtype=torch.bool).scatter(1, order[:, :outliers_per_token], True)
        assert torch.equal(outliers(quantizer, x), expected)


@pytest.mark.parametrize("channels", [1, 2, 7, 32, 101, 300])
@pytest.mark.parametrize("outlier_fraction", [0.01, 0.02, 0.1, 0.4])
def test_percentile_mask_is_numpys(channels: int, outlier_fraction: float) -> None:
    quantizer = PercentileSparse(
        channels=channels, inner=Identity(channels=channels), outlier_fraction=outlier_fraction
    )
    for x in (tokens(60, channels), tokens(60, channels).round()):
        tails = [outlier_fraction / 2, 1 - outlier_fraction / 2]
        lower, upper = np.quantile(x.double().numpy(), tails, axis=1, keepdims=True)
        # A percentile between two equal values is that value; numpy may miss it by a rounding.
        lower, upper = lower.astype(np.float32), upper.astype(np.float32)
        assert np.array_equal(outliers(quantizer, x).numpy(), (x.numpy() <= lower) | (x.numpy() >= upper))


def test_thresholds_are_exclusive() -> None:
    limit = torch.ones(3)
    quantizer = ThresholdSparse(channels=3, inner=Identity(channels=3), lower=-limit, upper=limit)
    x = torch.tensor([[-1.0, 1.0, 1.5], [-1.5, 0.0, 1.0]])
    assert outliers(quantizer, x).tolist() == [[False, False, True], [True, False, False]]


# ---- packing and bytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_round_trip(bits: int) -> None:
    for n_tokens, channels in [(0, 5), (1, 1), (3, 7), (2, 8), (5, 33)]:
        codes = torch.randint(0, 2**bits, (n_tokens, channels), dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (n_tokens, packed_bytes(channels, bits))
        assert packed_bytes(channels, bits) == -(-channels * bits // 8)
        assert torch.equal(unpack(packed, bits, channels), codes)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (1, "15"),
        (2, "39 01"),
        (3, "d1 58"),
        (4, "21 43 05"),
        (5, "41 0c 52 00"),
        (7, "01 c1 80 50 00"),
        (8, "01 02 03 04 05"),
    ],
)
def test_packed_bytes_are_frozen(bits: int, expected: str) -> None:
    """Code j at bit `bits * j`, least significant first: 1 + 2 * 8 + 3 * 64 + 4 * 512 + 5 * 4096 = 0x58d1 at 3 bits."""
    codes = torch.tensor([[1, 2, 3, 4, 5]]) & (2**bits - 1)
    assert bytes(pack(codes, bits)[0].tolist()).hex(" ") == expected


def test_packed_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 3 bytes a token \(8 codes of 3 bits\), got 4"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 3, 8)


@pytest.mark.parametrize(
    ("quantizer", "bits_per_element"),
    [
        (Identity(channels=32), 16.0),
        (affine(32, 3), 3.0),
        (codebook(32, 3), 3.0),
        (dynamic(32, 3), 3.0 + 32 / 32),
        (dynamic(32, 3, symmetric=True), 3.0 + 16 / 32),
        (dynamic_codebook(32, 3), 3.0 + 32 / 32),
        (RankSparse(channels=32, inner=affine(32, 3), outliers_per_token=1), 3.0 + (16 + 8) / 32),
        (RankSparse(channels=32, inner=dynamic(32, 2), outliers_per_token=2), 2.0 + (32 + 2 * 24) / 32),
        (affine(7, 3), 24 / 7),
    ],
)
def test_bits_per_element(quantizer: Quantizer, bits_per_element: float) -> None:
    x = tokens(10, quantizer.channels, torch.float16)
    assert quantizer.encode(x).nbytes * 8 / x.numel() == pytest.approx(bits_per_element, rel=1e-12)


# ---- construction


def wrong_levels(*values: float) -> Callable[[], Quantizer]:
    one = torch.ones(4)
    levels = torch.tensor([values], dtype=torch.float16)
    return lambda: Codebook(channels=4, bits=2, scale=one, offset=one, levels=levels)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: dynamic(4, 0), "bits must be an integer from 1 to 8"),
        (lambda: dynamic(4, 9), "bits must be an integer from 1 to 8"),
        (lambda: dynamic(4, True), "bits must be of type int"),
        (lambda: dynamic(4, 1, symmetric=True), "bits must be an integer from 2 to 8"),
        (lambda: dynamic(4, 3, symmetric=True, whole_zero_point=True), "no zero point"),
        (lambda: Identity(channels=0), "channels must be at least 1; got 0"),
        (
            lambda: Affine(channels=2, bits=3, scale=torch.tensor([1.0, 0.0])),
            "scale must be finite and positive; 1 of 2",
        ),
        (lambda: Affine(channels=2, bits=3, scale=torch.tensor([1.0, -1.0])), "scale must be finite and positive"),
        (lambda: Affine(channels=3, bits=3, scale=torch.ones(2)), r"scale must be float32 of shape \(3,\)"),
        (lambda: Affine(channels=2, bits=3, scale=torch.ones(2), offset=torch.full((2,), torch.nan)), "must be finite"),
        (wrong_levels(0, 2, 1, 3), "ascending"),
        (wrong_levels(0, 1, 2, torch.inf), "finite"),
        (wrong_levels(0, 1), r"more than 2 and at most 4 .* got torch.float16 of shape \(1, 2\)"),
        (wrong_levels(0, 1, 2, 3, 4), "more than 2 and at most 4"),
        (lambda: dynamic(24, 3, group_size=7), "must divide the 24 channels; got 7. Nearest that does: 6"),
        (lambda: dynamic(24, 3, group_size=0), "group_size must be an integer from 1; got 0"),
        (lambda: dynamic(24, 3, per="tensor", group_size=4), "group_size needs per"),
        (lambda: dynamic(24, 3, clip_ratio=0.0), "clip_ratio must be above 0 and below 1; got 0.0"),
        (lambda: mixed_codebook(24, 3).replace(bits=2.0), "as n_levels says; got 2.0"),
        (
            lambda: mixed_codebook(24, 3).replace(levels=normal_levels(3)[0]),
            r"levels must be float16 of shape \(120,\)",
        ),
        (
            lambda: ThresholdSparse(channels=4, inner=affine(4), lower=torch.ones(4), upper=-torch.ones(4)),
            "lower must not",
        ),
        (lambda: PercentileSparse(channels=4, inner=affine(4), outlier_fraction=0.5), r"in \(0, 0.5\); got 0.5"),
        (lambda: PercentileSparse(channels=4, inner=affine(4), outlier_fraction=float("nan")), r"in \(0, 0.5\)"),
        (lambda: RankSparse(channels=4, inner=affine(4), outliers_per_token=0), "from 1 to 3; got 0"),
        (lambda: RankSparse(channels=4, inner=affine(4), outliers_per_token=4), "from 1 to 3; got 4"),
        (lambda: RankSparse(channels=4, inner=affine(5), outliers_per_token=1), "a quantizer of 4 channels"),
    ],
)
def test_settings_are_checked_when_built(construct: Callable[[], Quantizer], message: str) -> None:
    """Settings of a wrong type are cases of `test_artifact.py`: here the shape checks of the tests come first."""
    with pytest.raises(ValueError, match=message):
        construct()


def test_a_moved_quantizer_is_kept_with_what_it_has_worked_out() -> None:
    """Each batch of an evaluation moved the quantizers anew, and lost their inverses, cuts and tables."""
    quantizer, meta = make("rank-affine"), torch.device("meta")
    site, other = Site(0, "value"), Site(1, "value")
    moved = quantizer.at(site).to(meta)
    assert quantizer.to(torch.device("cpu")) is quantizer
    assert quantizer.to(meta) is quantizer.to(meta)
    assert (moved.site, moved.at(other).site, quantizer.at(site).at(other).to(meta).site) == (site, other, other)
