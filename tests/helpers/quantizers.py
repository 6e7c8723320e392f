"""Every kind of quantizer, made by name: a new kind is one row of `QUANTIZERS`, and the contract runs over it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.block_float import BlockFloat
from artifacts.quantizers.centred import Centred
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.entropy_coded import EntropyCoded, mean_entropy
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.quantizers.float8 import DynamicFloat8, Float8
from artifacts.quantizers.hadamard import Hadamard
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.mixed_codebook import MixedCodebook, mean_bits
from artifacts.quantizers.normalised import Normalised
from artifacts.quantizers.rotated import Rotated
from artifacts.quantizers.signed_affine import SignedAffine
from artifacts.quantizers.sparse import CompactSparse, PercentileSparse, RankSparse, ThresholdSparse
from artifacts.quantizers.streaming import Streaming
from artifacts.sites import Site

SITE = Site(3, "key", "pre_rope")


BITS = 3


def steps(channels: int) -> Tensor:
    """A positive number for each channel, from 1 to 2."""
    return 1 + torch.arange(channels) / channels


def affine(channels: int, bits: int = BITS) -> Affine:
    half_range = 3 * steps(channels)
    return Affine(channels=channels, bits=bits, scale=2 * half_range / (2**bits - 1), offset=-half_range)


def symmetric(channels: int, bits: int = BITS) -> Affine:
    return Affine(channels=channels, bits=bits, scale=3 * steps(channels) / (2 ** (bits - 1) - 1))


def normal_levels(bits: int, tables: int = 1) -> Tensor:
    """Quantiles of the normal distribution on [-1, 1]; each further table a little narrower."""
    quantiles = torch.special.ndtri((torch.arange(2**bits) + 0.5).double() / 2**bits)
    narrower = torch.linspace(1, 0.8, tables).double()[:, None]
    return (narrower * quantiles / quantiles.max()).half()


def codebook(channels: int, bits: int = BITS, tables: int = 1) -> Codebook:
    return Codebook(
        channels=channels,
        bits=bits,
        scale=2 * steps(channels),
        offset=0.1 * steps(channels),
        levels=normal_levels(bits, tables),
    )


def threshold(inner: Quantizer) -> ThresholdSparse:
    limit = 2 * steps(inner.channels)
    return ThresholdSparse(channels=inner.channels, inner=inner, lower=-limit, upper=limit)


def percentile(inner: Quantizer) -> PercentileSparse:
    return PercentileSparse(channels=inner.channels, inner=inner, outlier_fraction=0.05)


def rank(inner: Quantizer) -> RankSparse:
    return RankSparse(channels=inner.channels, inner=inner, outliers_per_token=max(1, inner.channels // 10))


def dynamic(channels: int, bits: int = BITS, **options: Any) -> DynamicAffine:
    return DynamicAffine(channels=channels, bits=bits, **options)


def dynamic_codebook(channels: int, bits: int = BITS) -> DynamicCodebook:
    return DynamicCodebook(channels=channels, bits=bits, levels=normal_levels(bits))


def group(channels: int) -> int:
    """A size that divides the channels."""
    return math.gcd(channels, 4)


def odd_codebook(channels: int, bits: int) -> Codebook:
    """Three quarters of the levels that the bits could tell apart."""
    levels = torch.linspace(-1, 1, 3 * 2**bits // 4).half()[None]
    return Codebook(channels=channels, bits=bits, scale=2 * steps(channels), offset=steps(channels), levels=levels)


def mixed_codebook(channels: int, bits: int) -> MixedCodebook:
    """One level, then twice as many and three quarters of that, in turns."""
    n_levels = torch.tensor([1, 2**bits, max(2, 3 * 2**bits // 4)] * channels, dtype=torch.int16)[:channels]
    return MixedCodebook(
        channels=channels,
        bits=mean_bits(n_levels),
        scale=2 * steps(channels),
        offset=0.1 * steps(channels),
        n_levels=n_levels,
        levels=torch.cat([torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in n_levels.tolist()]).half(),
    )


def entropy_coded(channels: int, bits: int) -> EntropyCoded:
    """Tables of 15 indices that fall off by a third, and an escape symbol: few values need it at 3 bits, many at 8."""
    table = (2.0**15 * 0.2 * 0.667 ** (torch.arange(15) - 7).abs()).int().to(torch.int16)
    frequencies = torch.cat([table, 2**15 - table.sum(dtype=torch.int16)[None]]).repeat(channels)
    return EntropyCoded(
        channels=channels,
        bits=mean_entropy(frequencies, channels),
        group_tokens=4,
        step=torch.full((1,), 6 / 2**bits),
        offset=0.1 * steps(channels),
        first=torch.full((channels,), -7, dtype=torch.int16),
        n_indices=torch.full((channels,), 15, dtype=torch.int16),
        frequencies=frequencies,
        shifts=(-0.01 * (torch.arange(15) - 7)).half().repeat(channels),
    )


def rotated(inner: Quantizer) -> Rotated:
    """Weights from 1/4 to 1/2 and a rotation, of each half of the channels where there are halves."""
    groups = math.gcd(inner.channels, 2)
    width = inner.channels // groups
    noise = torch.randn(groups, width, width, generator=torch.Generator().manual_seed(0))
    basis = steps(width)[:, None] / 4 * torch.linalg.qr(noise).Q
    return Rotated(channels=inner.channels, inner=inner, basis=basis)


def hadamard(inner: Quantizer) -> Hadamard:
    signs = (1 - 2 * (torch.arange(inner.channels) % 3 % 2)).to(torch.int8)
    return Hadamard(channels=inner.channels, inner=inner, group_size=inner.channels & -inner.channels, signs=signs)


def centred(inner: Quantizer) -> Centred:
    mean = 0.3 * steps(inner.channels)
    return Centred(channels=inner.channels, inner=inner, mean=mean, restored=mean + 0.01)


def normalised(inner: Quantizer, **options: Any) -> Normalised:
    return Normalised(channels=inner.channels, inner=inner, **options)


def compact(inner: Quantizer) -> CompactSparse:
    """One outlier in each half of the channels."""
    head_dim = inner.channels // math.gcd(inner.channels, 2)
    unit = torch.full((1,), 0.1)
    return CompactSparse(channels=inner.channels, inner=inner, head_dim=head_dim, outliers_per_head=1, value_scale=unit)


def exact_sinks(inner: Quantizer) -> ExactSinks:
    """About a third of `tokens` is below the threshold."""
    least_norm = torch.tensor([1.45 * inner.channels**0.5])
    return ExactSinks(channels=inner.channels, inner=inner, least_norm=least_norm)


QUANTIZERS: dict[str, Callable[[int, int], Quantizer]] = {
    "identity": lambda channels, bits: Identity(channels=channels),
    "affine": affine,
    "affine-symmetric": symmetric,
    "dynamic": dynamic,
    "dynamic-symmetric": lambda channels, bits: dynamic(channels, bits, symmetric=True),
    "dynamic-whole-zero-point": lambda channels, bits: dynamic(channels, bits, whole_zero_point=True),
    "dynamic-per-channel": lambda channels, bits: dynamic(channels, bits, per="channel"),
    "dynamic-groups": lambda channels, bits: dynamic(channels, bits, group_size=group(channels)),
    "dynamic-groups-of-tokens": lambda channels, bits: dynamic(channels, bits, per="channel", group_size=4),
    "dynamic-per-tensor": lambda channels, bits: dynamic(channels, bits, per="tensor"),
    "dynamic-clipped": lambda channels, bits: dynamic(channels, bits, clip_ratio=0.9),
    "signed": lambda channels, bits: SignedAffine(channels=channels, bits=bits, group_size=group(channels)),
    "codebook": codebook,
    "codebook-odd": lambda channels, bits: odd_codebook(channels, bits),
    "codebook-per-head": lambda channels, bits: codebook(channels, bits, tables=channels // group(channels)),
    "mixed-codebook": lambda channels, bits: mixed_codebook(channels, bits),
    "entropy-coded": entropy_coded,
    "codebook-per-channel": lambda channels, bits: codebook(channels, bits, tables=channels),
    "dynamic-codebook": dynamic_codebook,
    "float8": lambda channels, bits: Float8(channels=channels, scale=steps(channels) / 100),
    "dynamic-float8": lambda channels, bits: DynamicFloat8(channels=channels),
    "grouped-float8": lambda channels, bits: DynamicFloat8(
        channels=channels, format="e5m2", group_size=math.gcd(channels, 4)
    ),
    "mxfp4": lambda channels, bits: BlockFloat(channels=channels),
    "nvfp4": lambda channels, bits: BlockFloat(channels=channels, format="nvfp4", tensor_scale=torch.full((1,), 0.01)),
    "streaming": lambda channels, bits: Streaming(
        channels=channels, bits=bits, chunk_tokens=4, decay=0.5, outlier_threshold_relative=1.01
    ),
    "streaming-groups": lambda channels, bits: Streaming(
        channels=channels, bits=bits, chunk_tokens=4, decay=0.0, groups=math.gcd(channels, 4)
    ),
    "threshold-affine": lambda channels, bits: threshold(affine(channels, bits)),
    "threshold-codebook": lambda channels, bits: threshold(codebook(channels, bits)),
    "percentile-dynamic": lambda channels, bits: percentile(dynamic(channels, bits)),
    "percentile-dynamic-codebook": lambda channels, bits: percentile(dynamic_codebook(channels, bits)),
    "rank-affine": lambda channels, bits: rank(affine(channels, bits)),
    "rank-symmetric": lambda channels, bits: rank(symmetric(channels, bits)),
    "rank-dynamic-per-channel": lambda channels, bits: rank(dynamic(channels, bits, per="channel")),
    "threshold-identity": lambda channels, bits: threshold(Identity(channels=channels)),
    "rank-centred": lambda channels, bits: rank(centred(affine(channels, bits))),
    "rank-compact": lambda channels, bits: compact(affine(channels, bits)),
    "rank-compact-dynamic": lambda channels, bits: compact(dynamic(channels, bits)),
    "rotated-affine": lambda channels, bits: rotated(affine(channels, bits)),
    "rotated-dynamic": lambda channels, bits: rotated(dynamic(channels, bits)),
    "hadamard-codebook": lambda channels, bits: hadamard(codebook(channels, bits)),
    "hadamard-dynamic-groups": lambda channels, bits: hadamard(dynamic(channels, bits, per="channel", group_size=4)),
    "centred-affine": lambda channels, bits: centred(affine(channels, bits)),
    "centred-dynamic-codebook": lambda channels, bits: centred(dynamic_codebook(channels, bits)),
    "hadamard-normalised": lambda channels, bits: hadamard(normalised(affine(channels, bits))),
    "normalised-codebook": lambda channels, bits: normalised(codebook(channels, bits), group_size=group(channels)),
    "normalised-dynamic": lambda channels, bits: normalised(dynamic(channels, bits), target="unit_norm", correct=True),
    "exact-sinks-codebook": lambda channels, bits: exact_sinks(codebook(channels, bits)),
    "exact-sinks-threshold": lambda channels, bits: exact_sinks(threshold(rotated(affine(channels, bits)))),
    "exact-sinks-groups": lambda channels, bits: exact_sinks(dynamic(channels, bits, per="channel", group_size=4)),
    "exact-sinks-entropy-coded": lambda channels, bits: exact_sinks(entropy_coded(channels, bits)),
}


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(name: str, channels: int = 24, bits: int = BITS) -> Quantizer:
    return QUANTIZERS[name](channels, bits)


def tokens(n_tokens: int, channels: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, a few of them ten times as large, each channel on its own scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, channels, generator=generator) * steps(channels)
    far = torch.rand(x.shape, generator=generator) < 0.01
    return torch.where(far, 10 * x, x).to(dtype)


def chain(quantizer: Quantizer) -> Iterator[Quantizer]:
    """The quantizer and what it wraps, outermost first."""
    yield quantizer
    inner = getattr(quantizer, "inner", None)
    if inner is not None:
        yield from chain(inner)


def all_codes(codes: Codes) -> dict[str, Tensor]:
    inner = {} if codes.inner is None else {f"inner.{k}": t for k, t in all_codes(codes.inner).items()}
    return {**codes.tensors, **inner}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
