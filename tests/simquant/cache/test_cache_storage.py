"""What a packed cache holds is what it counts, for quantizers of every kind."""

import gc

import pytest
import torch
from helpers.caches import filled, step, store_of
from helpers.quantizers import (
    QUANTIZERS,
    all_codes,
    assert_same,
    centred,
    compact,
    hadamard,
    make,
    normalised,
    odd_codebook,
    rank,
    tokens,
)
from helpers.sites import everywhere
from torch import Tensor
from transformers import LlamaForCausalLM

from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.streaming import Streaming
from simquant import CachePolicy, packed_cache
from simquant.policy.checks import check_cacheable

pytestmark = pytest.mark.shapes

CHANNELS = 16
HELD = [
    "identity",
    "dynamic-groups",
    "dynamic-groups-of-tokens",
    "codebook-odd",
    "mixed-codebook",
    "float8",
    "mxfp4",
    "streaming",
    "threshold-affine",
    "percentile-dynamic",
    "rank-affine",
    "rank-compact",
    "hadamard-normalised",
]
"""Rows, groups, running scales, and outliers in lists of any length."""


def running() -> Streaming:
    return Streaming(channels=CHANNELS, bits=4, chunk_tokens=4, outlier_threshold_relative=1.5)


WRAPPED = {
    "rank": lambda: rank(running()),
    "compact": lambda: compact(running()),
    "centred": lambda: centred(running()),
    "rank-hadamard-normalised": lambda: rank(hadamard(normalised(running(), correct=True))),
}


def live_bytes() -> int:
    """Of all plain tensors that the collector looks at."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) is Tensor)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held.values())


@pytest.mark.parametrize(
    ("name", "n_small"), [*((name, 0) for name in HELD), ("dynamic-groups-of-tokens", 3), ("rank-affine", 3)]
)
def test_nbytes_is_what_the_process_has_more_of(
    name: str, n_small: int, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simquant.cache.store.layer_store.BLOCK_TOKENS", 32)
    ids = torch.randint(3, 64, (2, 80))
    chunks = ids.split([70, *[1] * 6, 4], dim=1)
    policy = CachePolicy(sink_tokens=1, residual_tokens=4, block_tokens=4, keep_smallest_norm=n_small)
    quantizers = everywhere(lambda: QUANTIZERS[name](CHANNELS, 3), "post_rope")
    with packed_cache(tiny_llama, quantizers, policy=policy) as new:
        cache, other = new(), new()
        step(tiny_llama, other, ids[:, :20])  # tables that are made once are there
        gc.freeze()  # what is there by now is not looked at: a suite has a million objects
        for chunk in chunks:
            step(tiny_llama, cache, chunk)
        assert live_bytes() == pytest.approx(cache.nbytes, rel=0.05)
    assert other.nbytes < cache.nbytes
    for layer in cache.layers:
        for _, store in layer.store.stores():
            blocks = [list(codes.all_tensors()) for codes in store.blocks]
            content = [sum(tensor.nbytes for tensor in block) for block in blocks]
            capacity = [sum(tensor.untyped_storage().nbytes() for tensor in block) for block in blocks]
            assert sum(capacity) <= sum(content) + max(content)
            assert all(codes.shape[0] == 32 for codes in store.blocks[:-1])
            assert store.n_encoded + store.n_exact == 80


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("channels", [16, 21])
def test_codes_of_any_width_are_dense(channels: int, bits: int) -> None:
    quantizer = DynamicAffine(channels=channels, bits=bits)
    x, policy = tokens(50, channels), CachePolicy(sink_tokens=2, residual_tokens=5)
    store = filled(store_of(quantizer, policy), x, [20, *[1] * 10, 20])
    assert store.encoded_bytes == 43 * (-(-channels * bits // 8) + 4)
    assert torch.equal(store.read(2, 45), quantizer.simulate(x[2:45]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_that_fill_no_whole_bits_are_mixed_radix_integers(bits: int) -> None:
    quantizer = odd_codebook(200, bits)
    x = tokens(50, 200)
    store = filled(store_of(quantizer, CachePolicy(residual_tokens=5)), x, [20, *[1] * 10, 20])
    codes = store.codes()
    assert codes is not None
    assert_same(all_codes(codes), all_codes(quantizer.encode(x[:45])))
    assert torch.equal(store.read(0, 45), quantizer.simulate(x[:45]))
    assert store.encoded_bytes < 45 * 200 * bits / 8
    assert store.encoded_bytes >= 45 * 200 * torch.tensor(3 * 2**bits // 4).log2() / 8


@pytest.mark.parametrize("make_one", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 13, 20]], ids=["once", "one by one", "chunks"])
def test_a_running_state_goes_on_behind_wrappers(sizes: list[int], make_one: type[Quantizer]) -> None:
    quantizer, x = make_one(), tokens(40, CHANNELS)
    policy = CachePolicy(residual_tokens=2, block_tokens=4)
    store = filled(store_of(quantizer, policy), x, sizes)
    codes = store.codes()
    assert codes is not None
    assert_same(all_codes(codes), all_codes(quantizer.encode(x[:36])))
    assert torch.equal(store.read(0, 36), quantizer.simulate(x[:36]))
    assert not torch.equal(quantizer.simulate(x[32:36]), quantizer.simulate(x[:36])[32:])  # it does depend on the past
    check_cacheable(everywhere(make_one), policy)


def test_other_quantizers_have_no_state() -> None:
    for name in ("identity", "percentile-dynamic", "hadamard-normalised"):
        store = filled(store_of(make(name), CachePolicy()), tokens(12), [12])
        assert sum(tensor.nbytes for tensor in store.tensors()) == store.encoded_bytes
