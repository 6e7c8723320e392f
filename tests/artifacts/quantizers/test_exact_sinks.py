"""Tokens of small norm: which are kept, in how many bytes, and what becomes of the others.

What they owe to every quantizer's contract is checked in `test_quantizers.py`.
"""

import pytest
import torch
from helpers.quantizers import affine, all_codes, centred, codebook, dynamic, entropy_coded, every_dtype, make
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.quantizers.predicted import Predicted
from artifacts.sites import Site
from simquant.kernels.support import reads

pytestmark = pytest.mark.shapes

CHANNELS, N_TOKENS = 24, 40
SMALL = torch.arange(N_TOKENS) % 7 == 3
INNER = {
    "codebook": codebook(CHANNELS),
    "per channel": dynamic(CHANNELS, per="channel", group_size=16),  # the last group is shorter
    "per tensor": dynamic(CHANNELS, per="tensor"),
    "streams": entropy_coded(CHANNELS, 3),
}

every_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def around(inner: Quantizer, least_norm: float = 1.0) -> ExactSinks:
    return ExactSinks(channels=inner.channels, inner=inner, least_norm=torch.tensor([least_norm]))


def two_classes(dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens of norm 5, with those of norm 1/2 where `SMALL` is true."""
    x = torch.randn(N_TOKENS, CHANNELS)
    return (x / x.norm(dim=1, keepdim=True) * torch.where(SMALL, 0.5, 5.0)[:, None]).to(dtype)


@every_inner
@every_dtype
def test_tokens_of_the_small_class_come_back_in_16_bits(inner: Quantizer, dtype: torch.dtype) -> None:
    x, quantizer = two_classes(dtype), around(inner)
    y, codes = quantizer.simulate(x), quantizer.encode(x)
    assert torch.equal(y[SMALL], x[SMALL].half().to(dtype) if dtype == torch.float32 else x[SMALL])
    assert ((y - x).abs().amax(dim=1) > 1e-3)[~SMALL].all()
    n_kept = int(SMALL.sum())
    assert codes.inner is not None
    assert codes.nbytes == codes.inner.nbytes + N_TOKENS + n_kept * CHANNELS * 2
    assert quantizer.exact_tokens(codes).tolist() == SMALL.tolist()


@every_inner
def test_the_others_come_back_as_without_small_ones(inner: Quantizer) -> None:
    x = two_classes()
    stand_ins = around(inner).stand_ins(x, SMALL)
    assert torch.equal(around(inner).simulate(x)[~SMALL], inner.simulate(stand_ins)[~SMALL])
    assert torch.equal(stand_ins[~SMALL], x[~SMALL])
    if inner.tokens_per_scale == 1:
        assert torch.equal(around(inner).simulate(x)[~SMALL], inner.simulate(x)[~SMALL])


def test_a_kept_token_does_not_stretch_the_scales_of_its_group() -> None:
    x = 10 + 0.1 * torch.randn(16, CHANNELS)
    x[5] = 0
    inner = dynamic(CHANNELS, per="channel", group_size=16)
    plain, kept = ((q.simulate(x) - x).abs() for q in (inner, around(inner)))
    others = torch.arange(16) != 5
    assert 10 * kept[others].max() < plain[others].max()
    assert kept[5].max() == 0


def test_a_group_that_is_kept_whole_comes_back() -> None:
    x = torch.full((8, CHANNELS), 2.0**-10)
    assert torch.equal(around(dynamic(CHANNELS, per="channel", group_size=4)).simulate(x), x)


@pytest.mark.parametrize("inner", ["codebook", "streams"])
def test_around_a_prediction_a_stand_in_has_its_own_sources(inner: str) -> None:
    sources = (Site(0, "key", "pre_rope"), Site(0, "value"))
    predicted = Predicted(
        channels=CHANNELS,
        inner=INNER[inner],
        source_sites=" ".join(map(str, sources)),
        weight=torch.randn(20, CHANNELS).half(),
        bias=torch.ones(CHANNELS),
    )
    u = torch.randn(N_TOKENS, 12), torch.randn(N_TOKENS, 8)
    x = predicted.predict(u) + 0.1 * torch.randn(N_TOKENS, CHANNELS)
    x[SMALL] = 2.0**-8
    quantizer = around(predicted)
    assert quantizer.at(Site(1, "value")).sources == sources
    y, plain = quantizer.simulate(x, u), predicted.simulate(x, u)
    assert torch.equal(y[SMALL], x[SMALL])
    assert torch.equal(y[~SMALL], plain[~SMALL])
    if inner == "streams":  # what is encoded in the place of a kept token is as likely as another token
        assert quantizer.encode(x, u).inner.nbytes < predicted.encode(x, u).nbytes


def test_exact_tokens_are_found_inside_other_wrappers() -> None:
    x = two_classes() + 0.3 * (1 + torch.arange(CHANNELS) / CHANNELS)
    outer = centred(around(affine(CHANNELS)))
    assert outer.exact_tokens(outer.encode(x)).tolist() == SMALL.tolist()
    assert affine(CHANNELS).exact_tokens(affine(CHANNELS).encode(x)) is None


def test_a_token_at_the_threshold_is_quantized() -> None:
    x = torch.zeros(2, CHANNELS)
    x[0, 3], x[1, 3] = 1.0, 1 - 2.0**-20
    assert around(codebook(CHANNELS)).mask(x).tolist() == [False, True]


def test_codes_are_those_of_the_wrapped_quantizer_alone() -> None:
    """Also where that stores values of its own in the dtype of the tokens."""
    x, inner = two_classes(torch.bfloat16), make("threshold-codebook", CHANNELS)
    codes = around(inner).encode(x).inner
    assert codes is not None
    assert all(torch.equal(one, all_codes(inner.encode(x))[name]) for name, one in all_codes(codes).items())


@pytest.mark.parametrize("wrong", [0.0, -1.0, torch.nan, torch.inf, 65505.0])
def test_norms_that_could_not_be_stored_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="exact_sinks: least_norm must be"):
        around(codebook(CHANNELS), wrong)


def test_kernels_leave_it_to_torch() -> None:
    assert reads(affine(CHANNELS))
    assert not reads(around(affine(CHANNELS)))
