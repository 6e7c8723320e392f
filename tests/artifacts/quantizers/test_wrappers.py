"""Wrapping quantizers against naive references, and one inside another.

What they owe to every quantizer's contract is checked in `test_quantizers.py`.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.exact_sums import norm, on_grid
from artifacts.errors import NonFiniteError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.centred import Centred
from artifacts.quantizers.codebook import Codebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.hadamard import Hadamard, hadamard
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.normalised import Normalised
from artifacts.quantizers.rotated import Rotated
from artifacts.quantizers.sparse import CompactSparse, RankSparse, clamp_outliers
from artifacts.sites import Site

pytestmark = pytest.mark.shapes

SITE = Site(3, "key", "pre_rope")
EPS = torch.finfo(torch.float32).eps
CHANNELS = 128
UNIT = 0.25


def tokens(n_tokens: int, channels: int = CHANNELS) -> Tensor:
    """Heavy tails, and a scale and a mean of its own for each channel."""
    steps = 1 + torch.arange(channels) / channels
    return steps * (0.5 + torch.randn(n_tokens, channels) / torch.rand(n_tokens, 1).clamp_min(0.1))


def affine(channels: int = CHANNELS, bits: int = 4) -> Affine:
    one = torch.ones(channels)
    return Affine(channels=channels, bits=bits, scale=8 * one / (2**bits - 1), offset=-4 * one)


def codebook(channels: int = CHANNELS) -> Codebook:
    levels = torch.tensor([[-2.0, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 2.0]]).half()
    return Codebook(channels=channels, bits=3, scale=torch.ones(channels), offset=torch.zeros(channels), levels=levels)


def dynamic(channels: int = CHANNELS) -> DynamicAffine:
    return DynamicAffine(channels=channels, bits=4)


def exact(channels: int = CHANNELS) -> Identity:
    return Identity(channels=channels)


def rotation(groups: int, width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(groups, width, width, dtype=torch.float64)).Q.float()


def around(kind: Callable[..., Quantizer], inner: Quantizer, **options: Any) -> Quantizer:
    return kind(channels=inner.channels, inner=inner, **options)


def compact(inner: Quantizer, head_dim: int = 32, outliers_per_head: int = 1, unit: float = UNIT) -> CompactSparse:
    return CompactSparse(
        channels=inner.channels,
        inner=inner,
        head_dim=head_dim,
        outliers_per_head=outliers_per_head,
        value_scale=torch.tensor([unit]),
    )


def all_tensors(codes: Codes) -> list[Tensor]:
    return [*codes.tensors.values(), *(all_tensors(codes.inner) if codes.inner is not None else [])]


# ---- sums whose order is of no account


@pytest.mark.parametrize("terms", [1, 2, 3, 100, 1024, 4096])
def test_sums_of_products_on_the_grid_are_exact(terms: int) -> None:
    """All of one size and sign, so that partial sums use every bit that there is."""
    a, b = (on_grid(1.99 - 0.01 * torch.rand(1, terms)).double() for _ in range(2))
    true = sum(Fraction(p) * Fraction(q) for p, q in zip(a[0].tolist(), b[0].tolist(), strict=True))
    assert Fraction(float((a * b).sum())) == true
    assert Fraction(float(a @ b.T)) == true


def test_the_grid_is_fine_and_the_same_for_a_row_of_any_size() -> None:
    x = tokens(50)
    largest = x.abs().amax(dim=1, keepdim=True)
    assert ((on_grid(x) - x).abs() <= largest * 2.0**-23).all()
    assert (on_grid(x) != x).any()
    for power in (-90, -20, 100):
        assert torch.equal(on_grid(x * 2.0**power), on_grid(x) * 2.0**power)
    for extreme in (0.0, 1e-45, 1e-38, 3.4e38):
        assert (
            (on_grid(torch.tensor([[extreme, -extreme]])).abs() - extreme).abs() <= max(1e-37, 1e-6 * extreme)
        ).all()


def test_norms_are_euclidean_in_any_order() -> None:
    x = tokens(20) * 10.0 ** torch.arange(-10, 10)[:, None]
    expected = [math.hypot(*row) for row in x.tolist()]
    torch.testing.assert_close(norm(x)[:, 0], torch.tensor(expected), rtol=2 * EPS, atol=0)
    y = torch.randn(100, CHANNELS)
    assert torch.equal(norm(y[:, torch.randperm(CHANNELS)]), norm(y))


# ---- rotated


@pytest.mark.parametrize("groups", [1, 4])
def test_a_rotation_keeps_lengths_and_comes_back(groups: int) -> None:
    x = tokens(40)
    quantizer = Rotated(channels=CHANNELS, inner=exact(), basis=rotation(groups, CHANNELS // groups))
    z = quantizer.transform(x)
    size = x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(z.norm(dim=1, keepdim=True), size, rtol=4 * EPS, atol=0)
    assert ((quantizer.simulate(x) - x).abs() <= 4 * EPS * size).all()


@pytest.mark.parametrize("groups", [1, 4])
def test_any_invertible_matrix_is_multiplied_and_undone(groups: int) -> None:
    x, width = tokens(40), CHANNELS // groups
    weights = torch.logspace(-1, 1, width)[:, None]
    basis = weights * rotation(groups, width)
    quantizer = Rotated(channels=CHANNELS, inner=exact(), basis=basis)
    naive = torch.cat([part.double() @ m.double() for part, m in zip(x.split(width, 1), basis, strict=True)], dim=1)
    bound = 4 * EPS * naive.norm(dim=1, keepdim=True)
    assert ((quantizer.transform(x) - naive).abs() <= bound).all()
    assert ((quantizer.simulate(x) - x).abs() <= bound / weights.repeat(groups, 1).T).all()


def test_the_error_of_the_wrapped_quantizer_is_weighted_by_the_matrix() -> None:
    """What query weights are for: |(x - x') M| is what the wrapped quantizer leaves of z, whatever M is."""
    x, inner = tokens(30), affine()
    basis = torch.logspace(-1, 0, CHANNELS)[:, None] * rotation(1, CHANNELS)
    quantizer = Rotated(channels=CHANNELS, inner=inner, basis=basis)
    z = quantizer.transform(x)
    weighted = (x - quantizer.simulate(x)).double() @ basis[0].double()
    torch.testing.assert_close(weighted.float(), z - inner.simulate(z), rtol=0, atol=1e-4)


def test_coordinates_depend_on_no_order() -> None:
    """Tokens that are nearly a basis vector each: sums of large terms to nearly nothing show every rounding."""
    basis = rotation(1, CHANNELS)
    x, order = basis[0].T.contiguous(), torch.randperm(CHANNELS)
    quantizer = Rotated(channels=CHANNELS, inner=exact(), basis=basis)
    z = quantizer.transform(x)
    assert torch.equal(quantizer.replace(basis=basis[:, order]).transform(x[:, order]), z)
    for step in (quantizer.transform, quantizer.invert, lambda rows: hadamard(rows, CHANNELS)):
        assert torch.equal(torch.cat([step(part) for part in x.split([1, 3, 124])]), step(x))
        assert torch.equal(step(x.T.contiguous().T), step(x))


def test_each_group_has_its_own_basis() -> None:
    x, basis = tokens(5), rotation(4, 32)
    quantizer = Rotated(channels=CHANNELS, inner=exact(), basis=basis)
    changed = quantizer.replace(basis=torch.cat([basis[:1], -basis[1:]]))
    assert torch.equal(quantizer.transform(x)[:, :32], changed.transform(x)[:, :32])
    assert torch.equal(quantizer.transform(x)[:, 32:], -changed.transform(x)[:, 32:])


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (torch.zeros(2, 2, 2), "that of group 0 is inf"),
        (torch.stack([torch.eye(2), torch.ones(2, 2)]), "that of group 1 is inf"),
        (
            torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 1e-5]))]),
            r"at most 8192; that of group 1 is 5e\+04",
        ),
        (torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)]), "must be finite; that of group 1"),
        (torch.stack([torch.full((2, 2), torch.inf), torch.eye(2)]), "must be finite; that of group 0"),
        (torch.eye(2)[None], r"groups \* width = 4; got torch.float32 of shape \(1, 2, 2\)"),
        (torch.eye(4, dtype=torch.float64)[None], "must be float32 .* got torch.float64"),
    ],
)
def test_bases_that_cannot_be_undone_are_refused(basis: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message if basis.dtype == torch.float32 else None):
        Rotated(channels=4, inner=exact(4), basis=basis)


def test_the_condition_number_is_that_of_frobenius() -> None:
    """(1 + w^2) / (2 w) for diag(1, w): 8192 at w = 1 / 16384; and one for every multiple of a rotation."""
    basis = torch.diag(torch.tensor([1.0, 1 / 16384]))[None]
    with pytest.raises(ValueError, match="that of group 0 is 8192"):
        Rotated(channels=2, inner=exact(2), basis=basis)
    Rotated(channels=2, inner=exact(2), basis=basis.clamp_min(1 / 16380) * torch.eye(2))
    Rotated(channels=CHANNELS, inner=exact(), basis=1e-20 * rotation(2, 64))


# ---- hadamard


@pytest.mark.parametrize("group_size", [1, 2, 8, 64, 256, 1024])
def test_hadamard_is_sylvesters_matrix(group_size: int) -> None:
    x = torch.randn(7, 2 * group_size)
    matrix = scipy.linalg.hadamard(group_size) / math.sqrt(group_size)
    naive = np.concatenate([part.double().numpy() @ matrix for part in x.split(group_size, dim=1)], axis=1)
    z = hadamard(x, group_size)
    bound = group_size.bit_length() * EPS * x.norm(dim=1, keepdim=True)
    assert ((z - torch.from_numpy(naive)).abs() <= bound).all()
    torch.testing.assert_close(z.norm(dim=1), x.norm(dim=1), rtol=1e-6, atol=0)
    assert ((hadamard(z, group_size) - x).abs() <= 2 * bound).all()


def test_hadamard_spreads_an_outlier_evenly_over_its_block() -> None:
    x = torch.zeros(1, CHANNELS)
    x[0, 37] = 8.0
    z = hadamard(x, 64)
    assert torch.equal(z[0].abs(), torch.cat([torch.ones(64), torch.zeros(64)]))


def test_signs_come_before_the_transform() -> None:
    x, signs = tokens(5), torch.randint(0, 2, (CHANNELS,)).mul(2).sub(1).to(torch.int8)
    plain = Hadamard(channels=CHANNELS, inner=exact(), group_size=32)
    random = plain.replace(signs=signs)
    assert torch.equal(random.transform(x), plain.transform(x * signs))
    torch.testing.assert_close(random.simulate(x), x, rtol=0, atol=8 * EPS * float(x.abs().max()))
    assert random.static_bytes == CHANNELS
    assert plain.static_bytes == 0


# ---- centred


def test_restoring_the_mean_error_takes_it_out_of_any_weighted_mean() -> None:
    """Of values: what attention weights, which sum to one, make of the tokens."""
    x, mean = tokens(400), 0.5 * torch.ones(CHANNELS)
    coarse = Affine(channels=CHANNELS, bits=1, scale=3 * torch.ones(CHANNELS), offset=torch.zeros(CHANNELS))
    plain = Centred(channels=CHANNELS, inner=coarse, mean=mean)
    error = (x - plain.simulate(x)).double().mean(dim=0)
    assert error.abs().mean() > 0.1, "without a mean error there is nothing to correct"
    corrected = plain.replace(restored=(mean.double() + error).float())
    weights = torch.softmax(torch.randn(3, 400, dtype=torch.float64), dim=1)
    outputs = [weights @ quantizer.simulate(x).double() for quantizer in (plain, corrected)]
    torch.testing.assert_close(outputs[1], outputs[0] + error, rtol=0, atol=1e-6)
    assert (x - corrected.simulate(x)).double().mean(dim=0).abs().max() < 1e-6


def test_constant_channels_come_back_exactly_when_centred() -> None:
    value = torch.tensor([0.1, -3.7, 0.0, 1e4, 1e-6])
    inner = Affine(channels=5, bits=3, scale=torch.ones(5))
    quantizer = Centred(channels=5, inner=inner, mean=value)
    assert torch.equal(quantizer.simulate(value.expand(4, 5)), value.expand(4, 5))


def test_outliers_are_measured_from_the_mean() -> None:
    x, mean = tokens(5), torch.randn(CHANNELS)
    quantizer = Centred(channels=CHANNELS, inner=affine(), mean=mean)
    assert torch.equal(quantizer.outlier_score(x), affine().outlier_score(x - mean))


# ---- normalised


@pytest.mark.parametrize("group_size", [None, 4, 32])
@pytest.mark.parametrize("target", ["unit_variance", "unit_norm"])
def test_the_wrapped_quantizer_sees_unit_groups(group_size: int | None, target: str) -> None:
    x = tokens(30) * torch.logspace(-1, 3, 30)[:, None]
    quantizer = Normalised(channels=CHANNELS, inner=exact(), group_size=group_size, target=target)
    codes = quantizer.encode(x)
    assert codes.inner is not None
    width = group_size or CHANNELS
    seen = codes.inner.tensors["values"].unflatten(1, (-1, width)).norm(dim=2)
    wanted = math.sqrt(width) if target == "unit_variance" else 1.0
    torch.testing.assert_close(seen, torch.full_like(seen, wanted), rtol=2.0**-10, atol=0)
    assert codes.tensors["scale"].shape == (30, CHANNELS // width)
    assert codes.nbytes - codes.inner.nbytes == 30 * (CHANNELS // width) * 2
    torch.testing.assert_close(quantizer.decode(codes), x, rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("inner", [codebook(), affine(bits=2), dynamic()], ids=lambda q: q.kind)
@pytest.mark.parametrize("target", ["unit_variance", "unit_norm"])
def test_corrected_tokens_have_their_own_norm(inner: Quantizer, target: str) -> None:
    x = tokens(200)
    quantizer = Normalised(channels=CHANNELS, inner=inner, group_size=32, target=target, correct=True)

    def mismatch(quantizer: Quantizer) -> Tensor:
        decoded, own = (t.double().unflatten(1, (4, 32)).norm(dim=2) for t in (quantizer.simulate(x), x))
        return (decoded / own - 1).abs()

    assert mismatch(quantizer).max() <= 2.0**-11 + 1e-5
    assert mismatch(quantizer.replace(correct=False)).max() > 0.01


def test_the_two_targets_differ_by_the_units_of_the_wrapped_quantizer() -> None:
    x, inner = tokens(50), codebook()
    narrow = inner.replace(scale=inner.scale / 4)
    one = Normalised(channels=CHANNELS, inner=inner, group_size=16).encode(x)
    other = Normalised(channels=CHANNELS, inner=narrow, group_size=16, target="unit_norm").encode(x)
    assert all(torch.equal(a, b) for a, b in zip(all_tensors(one), all_tensors(other), strict=True))


@pytest.mark.parametrize("correct", [False, True])
def test_zeros_come_back_as_zeros(correct: bool) -> None:
    x = tokens(3)
    x[0], x[1, :32] = 0, 0
    assert codebook().simulate(x)[0].abs().min() > 0.2, "a table without a zero"
    y = Normalised(channels=CHANNELS, inner=codebook(), group_size=32, correct=correct).simulate(x)
    assert torch.equal(y == 0, x == 0)


def test_tokens_whose_codes_all_mean_zero_keep_their_scale() -> None:
    """No factor gives zero a norm: nothing may become infinite."""
    inner = Affine(channels=4, bits=2, scale=torch.full((4,), 100.0))
    x = torch.randn(5, 4)
    one, other = (Normalised(channels=4, inner=inner, correct=correct) for correct in (False, True))
    assert torch.equal(one.encode(x).tensors["scale"], other.encode(x).tensors["scale"])
    assert torch.equal(other.simulate(x), torch.zeros(5, 4))


def test_codes_of_directions_do_not_depend_on_length() -> None:
    x = tokens(20)
    quantizer = Normalised(channels=CHANNELS, inner=affine(), group_size=32)
    assert torch.equal(quantizer.simulate(x * 16), quantizer.simulate(x) * 16)


def test_norms_beyond_float16_are_refused() -> None:
    quantizer = Normalised(channels=4, inner=affine(4)).at(SITE)
    assert torch.isfinite(quantizer.simulate(torch.full((1, 4), 65504.0))).all()
    with pytest.raises(NonFiniteError, match=r"^layers\.3\.key\.pre_rope: .* of 1e\+05 does not fit float16"):
        quantizer.encode(torch.full((1, 4), 1e5))


# ---- compact outliers


INNERS = [affine(), codebook(), dynamic()]


def at_edges(quantizer: CompactSparse, x: Tensor) -> Tensor:
    heads = zip(x.split(quantizer.head_dim, dim=1), quantizer.mask(x).split(quantizer.head_dim, dim=1), strict=True)
    return torch.cat([clamp_outliers(*head) for head in heads], dim=1)


def naive_mask(quantizer: CompactSparse, x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for first in range(0, quantizer.channels, quantizer.head_dim):
        head = quantizer.inner.outlier_score(x)[:, first : first + quantizer.head_dim]
        order = head.sort(dim=1, descending=True, stable=True).indices[:, : quantizer.outliers_per_head]
        mask[torch.arange(len(x))[:, None], first + order] = True
    return mask


@pytest.mark.parametrize("inner", INNERS, ids=lambda q: q.kind)
@pytest.mark.parametrize(("head_dim", "outliers_per_head"), [(128, 2), (32, 1), (4, 3), (2, 1)])
def test_only_the_furthest_of_each_head_are_mended(inner: Quantizer, head_dim: int, outliers_per_head: int) -> None:
    x, quantizer = tokens(40), compact(inner, head_dim, outliers_per_head)
    mask = naive_mask(quantizer, x)
    assert torch.equal(quantizer.mask(x), mask)
    assert torch.equal(quantizer.mask(x.round()), naive_mask(quantizer, x.round())), "of equals, the first channels"
    y, dense = quantizer.simulate(x), inner.simulate(at_edges(quantizer, x))
    assert torch.equal(y[~mask], dense[~mask])
    missed = (x - dense).abs()[mask]
    assert missed.max() < 448 * UNIT, "nothing saturates"
    assert ((x - y).abs()[mask] <= (missed / 16).maximum(torch.tensor(UNIT * 2.0**-10)) + 8 * EPS * x.abs().max()).all()


@pytest.mark.parametrize("inner", INNERS, ids=lambda q: q.kind)
@pytest.mark.parametrize("unit", [1e-4, UNIT, 100.0])
def test_a_residual_never_enlarges_the_error(inner: Quantizer, unit: float) -> None:
    """However wrong its unit: too large and it vanishes, too small and it saturates."""
    x, quantizer = tokens(40), compact(inner, unit=unit)
    dense = inner.simulate(at_edges(quantizer, x))
    assert ((x - quantizer.simulate(x)).abs() <= (x - dense).abs() + 4 * EPS * x.abs().max()).all()


def test_residuals_saturate_at_448_units() -> None:
    x = torch.zeros(2, 4)
    x[0, 1], x[1, 2] = 1e4, -1e4
    quantizer = compact(DynamicAffine(channels=4, bits=8), head_dim=4, unit=2.0)
    assert torch.equal(quantizer.simulate(x), x.clamp(-896, 896))


def test_compact_codes_by_hand() -> None:
    """Two heads of four: places 2 and 1, at two bits each 2 + 1 * 4 = 6; 3 and -0.5 as sign, exponent + 7, mantissa."""
    x = torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0, -0.5, 0.0, 0.0]])
    codes = compact(DynamicAffine(channels=8, bits=2), head_dim=4, unit=1.0).encode(x)
    assert codes.tensors["indices"].tolist() == [[6]]
    assert codes.tensors["values"].tolist() == [[0b0_1000_100, 0b1_0110_000]]


@pytest.mark.parametrize(
    ("channels", "head_dim", "outliers_per_head", "own_bytes"),
    [
        (1024, 128, 2, 16 + 14),  # 16 outliers of 8 + 7 bits
        (24, 12, 1, 2 + 1),  # 2 of 8 + 4
        (256, 256, 1, 1 + 1),
        (6, 3, 2, 4 + 1),
    ],
)
def test_compact_outliers_cost_eight_bits_and_an_index(
    channels: int, head_dim: int, outliers_per_head: int, own_bytes: int
) -> None:
    codes = compact(affine(channels), head_dim, outliers_per_head).encode(tokens(9, channels))
    assert codes.inner is not None
    assert codes.nbytes - codes.inner.nbytes == 9 * own_bytes


def test_compact_outliers_are_worth_their_bits_on_heavy_tails() -> None:
    x, inner = tokens(300), dynamic()
    errors = [
        float((x - quantizer.simulate(x)).square().mean())
        for quantizer in (inner, compact(inner), compact(inner, outliers_per_head=3))
    ]
    assert errors == sorted(errors, reverse=True)


# ---- one inside another

NESTED: dict[str, Callable[[], Quantizer]] = {
    "hadamard-normalised-codebook": lambda: around(
        Hadamard, around(Normalised, codebook(), group_size=32, correct=True), group_size=32
    ),
    "normalised-hadamard-codebook": lambda: around(
        Normalised, around(Hadamard, codebook(), group_size=32), group_size=32, correct=True
    ),
    "rotated-compact-dynamic": lambda: around(Rotated, compact(dynamic()), basis=rotation(1, CHANNELS)),
    "compact-centred-affine": lambda: compact(around(Centred, affine(), mean=torch.ones(CHANNELS))),
    "rank-normalised-affine": lambda: around(RankSparse, around(Normalised, affine()), outliers_per_token=2),
    "centred-rotated-affine": lambda: around(
        Centred, around(Rotated, affine(), basis=rotation(4, 32)), mean=torch.ones(CHANNELS)
    ),
}

every_nest = pytest.mark.parametrize("name", NESTED)


@every_nest
@pytest.mark.parametrize("sizes", [[1, 16], [9, 8], [1] * 17])
def test_codes_of_consecutive_tokens_concatenate(name: str, sizes: list[int]) -> None:
    x, quantizer = tokens(17), NESTED[name]()
    whole, joined = quantizer.encode(x), Codes.cat([quantizer.encode(part) for part in x.split(sizes)])
    assert joined.shape == whole.shape
    for one, other in zip(all_tensors(joined), all_tensors(whole), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(quantizer.decode(joined), quantizer.simulate(x))


def test_the_outer_wrapper_comes_first_in_encoding_and_last_in_decoding() -> None:
    x, basis, mean = tokens(5), rotation(1, CHANNELS), torch.ones(CHANNELS)
    outer = around(Rotated, around(Centred, affine(), mean=mean), basis=basis)
    step = Rotated(channels=CHANNELS, inner=exact(), basis=basis)
    assert torch.equal(outer.simulate(x), step.invert(affine().simulate(step.transform(x) - mean) + mean))
    swapped = around(Centred, around(Rotated, affine(), basis=basis), mean=mean)
    assert not torch.allclose(outer.simulate(x), swapped.simulate(x), atol=0.1)


def test_lengths_and_rotations_can_be_taken_out_in_either_order() -> None:
    """A rotation keeps norms: only values on the border between two codes may tell the orders apart."""
    x = tokens(200)
    one, other = (NESTED[name]().simulate(x) for name in list(NESTED)[:2])
    close = torch.isclose(one, other, rtol=2.0**-10, atol=1e-4 * float(x.abs().max())).all(dim=1)
    assert close.float().mean() > 0.9
    assert (one - x).norm() < 0.3 * x.norm()


def test_a_wrapper_shares_scales_as_what_it_wraps() -> None:
    per_channel = DynamicAffine(channels=CHANNELS, bits=4, per="channel")
    for inner in (dynamic(), per_channel):
        for wrapper in (around(Hadamard, inner, group_size=2), around(Normalised, inner), compact(inner)):
            assert wrapper.tokens_per_scale == inner.tokens_per_scale


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Rotated, {"basis": torch.eye(4)[None]}),
        (Hadamard, {"group_size": 4}),
        (Centred, {"mean": torch.zeros(4)}),
        (Normalised, {}),
        (CompactSparse, {"head_dim": 4, "outliers_per_head": 1, "value_scale": torch.ones(1)}),
    ],
)
def test_what_is_wrapped_has_the_same_channels(kind: type[Quantizer], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{kind.kind}: inner must be a quantizer of 4 channels"):
        kind(channels=4, inner=exact(5), **options)


@pytest.mark.parametrize(
    "quantizer",
    [
        around(Hadamard, exact(2), group_size=2),
        around(Centred, exact(2), mean=torch.full((2,), -3e38)),
        around(Rotated, exact(2), basis=2 * torch.eye(2)[None]),
    ],
    ids=lambda q: q.kind,
)
def test_what_float32_cannot_hold_is_refused(quantizer: Quantizer) -> None:
    with pytest.raises(NonFiniteError, match=r"^layers\.3\.key\.pre_rope: values of up to 3e\+38"):
        quantizer.at(SITE).encode(torch.full((1, 2), 3e38))


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: around(Hadamard, exact(24), group_size=16), "divides 24 channels; got 16. The largest is 8"),
        (lambda: around(Hadamard, exact(24), group_size=3), "power of two"),
        (lambda: around(Hadamard, exact(24), group_size=0), "power of two"),
        (
            lambda: around(Hadamard, exact(4), group_size=4, signs=torch.tensor([1, 0, -1, 2], dtype=torch.int8)),
            r"\+1 or -1; 2 of 4 are not",
        ),
        (
            lambda: around(Hadamard, exact(4), group_size=4, signs=torch.ones(3, dtype=torch.int8)),
            r"int8 of shape \(4,\); got torch.int8 of shape \(3,\)",
        ),
        (lambda: around(Centred, exact(2), mean=torch.tensor([0.0, torch.nan])), "mean must be finite; 1 of 2"),
        (
            lambda: around(Centred, exact(2), mean=torch.zeros(2), restored=torch.tensor([torch.inf, 0.0])),
            "restored must be finite",
        ),
        (lambda: around(Normalised, exact(24), group_size=7), "must divide the 24 channels; got 7. Nearest"),
        (lambda: compact(exact(24), head_dim=7), "divide 24 channels; got 7"),
        (lambda: compact(exact(512), head_dim=512), "from 2 to 256 .* got 512"),
        (lambda: compact(exact(24), head_dim=1), "from 2 to 256 .* got 1"),
        (lambda: compact(exact(24), 24, outliers_per_head=24), "from 1 to 23; got 24"),
        (lambda: compact(exact(24), 24, outliers_per_head=0), "from 1 to 23; got 0"),
        (lambda: compact(exact(24), 24, unit=0.0), "value_scale must be finite and positive"),
    ],
)
def test_settings_are_checked_when_built(construct: Callable[[], Quantizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        construct()


def test_a_wrapper_around_another_quantizer_moves_with_that_one() -> None:
    """What had been moved before was given back, with the old quantizer in it."""
    elsewhere = torch.device("meta")
    before = Rotated(channels=8, inner=DynamicAffine(channels=8, bits=2), basis=torch.eye(8)[None])
    before.to(elsewhere)
    after = before.wrapping(DynamicAffine(channels=8, bits=7))
    assert after.to(elsewhere).spec.inner.bits == 7  # type: ignore[union-attr]
