"""Checks that every quantizer passes, a new one of a notebook too: each takes a name of the matrix."""

from collections.abc import Callable

import pytest
import torch
from helpers.quantizers import (
    SITE,
    all_codes,
    assert_same,
    make,
    tokens,
)

from artifacts.errors import MismatchError
from artifacts.quantizers.streaming import Streaming


def check_no_tokens_are_no_bytes(name: str) -> None:
    quantizer = make(name)
    if quantizer.tokens_per_scale == 1:
        codes = quantizer.encode(torch.empty(0, 24))
        assert codes.nbytes == 0
        assert quantizer.decode(codes).shape == (0, 24)


def check_same_codes_every_time(name: str) -> None:
    quantizer, x = make(name), tokens(6)
    assert_same(all_codes(quantizer.encode(x)), all_codes(quantizer.encode(x)))


def check_bytes_are_counted(name: str) -> None:
    quantizer = make(name)
    codes = quantizer.encode(tokens(6))
    assert codes.nbytes == sum(tensor.nbytes for tensor in all_codes(codes).values())
    assert quantizer.static_bytes == sum(tensor.nbytes for tensor in quantizer.tensors().values())
    assert quantizer.decode_multiply_adds >= 0


def check_memory_layout_is_of_no_account(name: str) -> None:
    quantizer, x = make(name), tokens(13)
    assert_same(all_codes(quantizer.encode(x.T.contiguous().T)), all_codes(quantizer.encode(x)))


def check_more_bits_never_raise_the_error(name: str) -> None:
    x = tokens(200)
    errors = [float((x - make(name, bits=bits).simulate(x)).square().mean()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def check_another_width_is_refused(name: str) -> None:
    with pytest.raises(MismatchError, match=r"^layers\.3\.key\.pre_rope: .*5\).* 24 channels"):
        make(name).at(SITE).encode(tokens(3, channels=5))


def check_without_a_site_errors_name_the_kind(name: str) -> None:
    quantizer = make(name)
    with pytest.raises(MismatchError, match=f"^{quantizer.kind}: "):
        quantizer.encode(tokens(3, channels=5))


def check_shape_and_dtype(name: str, dtype: torch.dtype) -> None:
    narrow = not name.startswith("rank")  # of one channel none can be ranked out
    for n_tokens, channels in [(1, 24), (5, 7), (2, 300), *([(3, 1)] if narrow else [])]:
        quantizer, x = make(name, channels), tokens(n_tokens, channels, dtype)
        codes = quantizer.encode(x)
        assert (codes.shape, codes.dtype) == ((n_tokens, channels), dtype)
        y = quantizer.decode(codes)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert torch.isfinite(y).all()


def check_simulate_is_decode_of_encode(name: str, dtype: torch.dtype) -> None:
    quantizer, x = make(name), tokens(6, dtype=dtype)
    before = x.clone()
    once = quantizer.simulate(x)
    assert torch.equal(once, quantizer.decode(quantizer.encode(x)))
    assert torch.equal(x, before), "the input was changed"


def check_chunked_is_one_shot(name: str, dtype: torch.dtype) -> None:
    quantizer, x = make(name), tokens(13, dtype=dtype)
    group_tokens = quantizer.tokens_per_scale
    if group_tokens is None or isinstance(quantizer, Streaming):  # whose parts need its state: `test_streaming.py`
        return
    splits = ([1] * 13, [5, 8], [12, 1]) if group_tokens == 1 else ([group_tokens, 13 - group_tokens],)
    for sizes in splits:
        parts = [quantizer.simulate(part) for part in x.split(sizes)]
        assert torch.equal(torch.cat(parts), quantizer.simulate(x))


CHECKS: list[Callable[[str], None]] = [
    check_no_tokens_are_no_bytes,
    check_same_codes_every_time,
    check_bytes_are_counted,
    check_memory_layout_is_of_no_account,
    check_more_bits_never_raise_the_error,
    check_another_width_is_refused,
    check_without_a_site_errors_name_the_kind,
]
CHECKS_BY_DTYPE: list[Callable[[str, torch.dtype], None]] = [
    check_shape_and_dtype,
    check_simulate_is_decode_of_encode,
    check_chunked_is_one_shot,
]

every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
every_check_by_dtype = pytest.mark.parametrize("check", CHECKS_BY_DTYPE, ids=lambda check: check.__name__)
