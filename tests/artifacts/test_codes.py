"""Codes of some tokens out of many: those of the tokens that are asked for, or a refusal."""

from collections.abc import Callable

import pytest
import torch
from helpers.quantizers import QUANTIZERS, every_quantizer, make, tokens

from artifacts.codes import Codes
from artifacts.coding.span import Span
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.entropy_coded import EntropyCoded

pytestmark = pytest.mark.shapes


def per_group() -> Quantizer:
    return DynamicAffine(channels=8, bits=4, per="channel", group_size=4)


def attempted(call: Callable[[], Codes]) -> Codes | str:
    """What is given back, or why it is refused."""
    try:
        return call()
    except ValueError as error:
        return str(error)


def last(n_kept: int, n_tokens: int) -> torch.Tensor:
    return torch.arange(n_tokens) >= n_tokens - n_kept


def test_tokens_that_share_scales_are_not_parted() -> None:
    """Groups were guessed from ratios: 6 tokens with 2 scales were taken for groups of 3, and came back 19.1 off."""
    codes = per_group().encode(tokens(6, 8))
    message = "cannot drop 3 of 6 tokens: they share scale groups with kept tokens; drop whole groups"
    with pytest.raises(ValueError, match=message):
        codes.select(last(3, 6))
    with pytest.raises(ValueError, match=message):
        codes.first(3)
    assert torch.equal(per_group().decode(codes.select(last(2, 6))), per_group().decode(codes)[4:])
    assert torch.equal(per_group().decode(codes.first(4)), per_group().decode(codes)[:4])


def test_a_stream_is_not_parted() -> None:
    """`first(3)` of 2 streams of 6 tokens gave one stream of 4, whose reading as 3 tokens ended in a panic of Rust."""
    quantizer = make("entropy-coded")
    assert isinstance(quantizer, EntropyCoded)
    group = quantizer.group_tokens
    codes = quantizer.encode(tokens(group + group // 2))
    for n_tokens in range(1, len(codes.tensors["counts"]) * group):
        if n_tokens % group and n_tokens < codes.shape[0]:
            with pytest.raises(ValueError, match="cannot drop"):
                codes.first(n_tokens)


@every_quantizer
@pytest.mark.parametrize("n_tokens", [1, 5, 6, 9])
def test_what_is_selected_is_what_is_decoded(name: str, n_tokens: int) -> None:
    """Either refused, or the very tokens; a single token is never refused, nor are whole groups of any kind."""
    quantizer, generator = make(name), torch.Generator().manual_seed(0)
    codes, group = quantizer.encode(tokens(n_tokens)), quantizer.tokens_per_scale or n_tokens
    decoded = quantizer.decode(codes)
    for kept in torch.rand(8, n_tokens, generator=generator) < 0.5:
        whole = kept[torch.arange(n_tokens) // group]
        selected = attempted(lambda kept=kept: codes.select(kept))
        if isinstance(selected, str):
            assert "cannot drop" in selected
            assert not torch.equal(kept, whole) or name.startswith("streaming"), "whose lengths are not stored"
        else:
            assert torch.equal(quantizer.decode(selected), decoded[kept])
        if whole.any() and not name.startswith("streaming"):
            assert torch.equal(quantizer.decode(codes.select(whole)), decoded[whole])


@every_quantizer
@pytest.mark.parametrize("sizes", [(4, 4, 1), (3, 3), (2, 3), (0, 4, 0, 2)], ids=str)
def test_what_is_joined_is_what_is_decoded(name: str, sizes: tuple[int, ...]) -> None:
    """Parts that end within a group, or whose scales span different numbers of tokens, gave other values."""
    quantizer = make(name)
    parts = [quantizer.encode(part) for part in tokens(sum(sizes)).split(sizes)]
    joined = attempted(lambda: Codes.cat(parts))
    if isinstance(joined, str):
        assert "cannot be followed by" in joined
        assert quantizer.tokens_per_scale != 1
    else:
        assert torch.equal(quantizer.decode(joined), torch.cat([quantizer.decode(part) for part in parts]))


def test_entries_that_belong_to_no_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale has 2 entries; 6 tokens with 1 for each 1 need 6\. Give"):
        Codes(tensors={"scale": torch.ones(2)}, shape=(6, 8), dtype=torch.float32)
    Codes(tensors={"scale": torch.ones(2)}, shape=(6, 8), dtype=torch.float32, spans={"scale": Span(tokens=4)})


def test_all_ways_to_store_are_among_those() -> None:
    spans = {span for name in QUANTIZERS for span in make(name).encode(tokens(9)).spans.values()}
    assert {Span(1, "counts"), Span(4), Span(4, "counts"), Span(4, None), Span(9)} <= spans
