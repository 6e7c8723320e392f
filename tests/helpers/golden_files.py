"""The files under `tests/golden` that freeze the formats: what stands in them, and how they are written.

Run `PYTHONPATH=.:tests python tests/helpers/golden_files.py` to write those that are missing. What is there stays as it
is: a file is only written anew, by hand and under a new version or kind, when a format has been changed on purpose.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from helpers.models import random_llama
from torch import Tensor

from artifacts.artifact import Artifact, load, save
from artifacts.codes import Codes
from artifacts.coding.mixed_radix import MixedRadix
from artifacts.manifest import CorpusRecord, Manifest
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.block_float import BlockFloat
from artifacts.quantizers.centred import Centred
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.entropy_coded import EntropyCoded
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.quantizers.float8 import DynamicFloat8, Float8
from artifacts.quantizers.hadamard import Hadamard
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.mixed_codebook import MixedCodebook
from artifacts.quantizers.normalised import Normalised
from artifacts.quantizers.predicted import Predicted
from artifacts.quantizers.rotated import Rotated
from artifacts.quantizers.signed_affine import SignedAffine
from artifacts.quantizers.sparse import CompactSparse, PercentileSparse, RankSparse, ThresholdSparse
from artifacts.quantizers.streaming import Streaming
from artifacts.sites import Site
from artifacts.storage import Stored, read, write
from simquant import CachePolicy, Eviction, packed_cache, save_cache
from simquant.cache.saving.cache_record import CacheReader, codes_record
from simquant.cache.saving.tensor_pool import TensorPool, take
from simquant.cache.store.rotary_tables import RotaryTables
from simquant.cache.transformers_cache import PackedCache

GOLDEN = Path(__file__).parents[1] / "golden"
ARTIFACT_FILES = {"artifact.safetensors", "artifact.pkl", "decoded.safetensors"}
CHANNELS, N_TOKENS = 8, 7
CODES_FORMAT = "kvgauge.golden.codes"

# All numbers are sums of few powers of two, so that no machine rounds them differently.
STEPS = 1 + torch.arange(CHANNELS) / 8
LEVELS = torch.tensor([[-1.0, -0.5, 0.25, 1.0]]).half()


def tokens(dtype: torch.dtype = torch.float32, n_tokens: int = N_TOKENS, first: int = 0) -> Tensor:
    """Multiples of 1/16 between -4 and 4."""
    numbers = torch.arange(first, first + n_tokens * CHANNELS)
    return ((numbers * 37 % 129) - 64).view(n_tokens, CHANNELS).to(dtype) / 16


def affine(bits: int = 3, **options: Any) -> Affine:
    return Affine(channels=CHANNELS, bits=bits, scale=STEPS * 8 / 2**bits, offset=-4 * STEPS, **options)


def dynamic(bits: int = 4, **options: Any) -> DynamicAffine:
    return DynamicAffine(channels=CHANNELS, bits=bits, **options)


def codebook(levels: Tensor = LEVELS, bits: int = 2, **options: Any) -> Codebook:
    return Codebook(channels=CHANNELS, bits=bits, scale=2 * STEPS, offset=STEPS / 4, levels=levels, **options)


def mixed_codebook() -> MixedCodebook:
    """Of 3, 1, 5, ... levels: digits of words that several cuts would make equally long."""
    n_levels = torch.tensor([3, 1, 5, 10, 2, 7, 16, 33], dtype=torch.int16)
    levels = torch.cat([torch.arange(n) - n // 2 for n in n_levels.tolist()]).half() / 4
    fields = {"scale": STEPS, "offset": STEPS / 8, "n_levels": n_levels, "levels": levels}
    return MixedCodebook(channels=CHANNELS, bits=2.510071, **fields)


def entropy_coded(*, shifted: bool) -> EntropyCoded:
    """Three indices a channel, each of a probability that is a power of two; the others are escaped."""
    table = torch.tensor([8192, 16384, 4096, 4096], dtype=torch.int16)
    numbers = {"first": torch.full((CHANNELS,), -1, dtype=torch.int16)}
    numbers["n_indices"] = torch.full((CHANNELS,), 3, dtype=torch.int16)
    shifts = torch.tensor([0.25, 0.0, -0.25]).half().repeat(CHANNELS) if shifted else None
    fields = {"step": torch.ones(1), "offset": STEPS / 4, "frequencies": table.repeat(CHANNELS), "shifts": shifts}
    return EntropyCoded(channels=CHANNELS, bits=1.75, group_tokens=4, **fields, **numbers)


def basis(*weights: float) -> Tensor:
    """A Hadamard matrix of order four for each weight, times it."""
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return torch.stack([weight * torch.kron(one, one) / 2 for weight in weights])


def rotated(inner: Quantizer, matrix: Tensor) -> Rotated:
    return Rotated(channels=CHANNELS, inner=inner, basis=matrix)


def predicted(inner: Quantizer, sources: str, rank: int | None = None) -> Predicted:
    inputs = CHANNELS * len(sources.split())
    weight = ((torch.arange(inputs * (rank or CHANNELS)) * 5 % 9 - 4) / 16).view(inputs, -1).half()
    expansion = None if rank is None else ((torch.arange(rank * CHANNELS) * 7 % 5 - 2) / 4).view(rank, -1).half()
    fields = {"weight": weight, "expansion": expansion, "bias": STEPS / 2}
    return Predicted(channels=CHANNELS, inner=inner, source_sites=sources, **fields)


def sparse() -> list[Quantizer]:
    limits = {"lower": -3 * STEPS, "upper": 2.5 * STEPS}
    unit = torch.full((1,), 0.125)
    return [
        ThresholdSparse(channels=CHANNELS, inner=codebook(), **limits),
        PercentileSparse(channels=CHANNELS, inner=dynamic(3), outlier_fraction=0.125),
        RankSparse(channels=CHANNELS, inner=affine(), outliers_per_token=2),
        CompactSparse(channels=CHANNELS, inner=affine(2), head_dim=4, outliers_per_head=1, value_scale=unit),
        RankSparse(channels=CHANNELS, inner=dynamic(per="channel", group_size=4), outliers_per_token=1),
    ]


def transforms() -> list[Quantizer]:
    signs = (1 - 2 * (torch.arange(CHANNELS) % 3 % 2)).to(torch.int8)
    return [
        rotated(affine(4), basis(1.0, 0.5)),
        rotated(dynamic(), basis(2.0, 1.0)),
        Hadamard(channels=CHANNELS, inner=dynamic(), group_size=8, signs=signs),
        Hadamard(channels=CHANNELS, inner=affine(), group_size=4),
        Centred(channels=CHANNELS, inner=affine(), mean=STEPS / 2),
        Centred(channels=CHANNELS, inner=dynamic(), mean=STEPS / 2, restored=STEPS / 4),
        Normalised(channels=CHANNELS, inner=codebook(), group_size=4),
        Normalised(channels=CHANNELS, inner=dynamic(), target="unit_norm", correct=True),
    ]


def exact_sinks(inner: Quantizer, least_norm: float = 6.5) -> ExactSinks:
    return ExactSinks(channels=CHANNELS, inner=inner, least_norm=torch.tensor([least_norm]))


FAMILIES: dict[str, list[Quantizer]] = {
    "uniform": [*(affine(bits) for bits in range(1, 9)), Affine(channels=CHANNELS, bits=4, scale=STEPS / 4)],
    "dynamic": [
        dynamic(),
        dynamic(5, symmetric=True),
        dynamic(7, whole_zero_point=True),
        dynamic(2, group_size=4),
        dynamic(3, per="channel"),
        dynamic(4, per="channel", group_size=4),
        dynamic(6, per="tensor"),
        dynamic(8, clip_ratio=0.5),
        SignedAffine(channels=CHANNELS, bits=4, group_size=4),
        DynamicCodebook(channels=CHANNELS, bits=2, levels=LEVELS),
    ],
    "codebooks": [
        codebook(),
        codebook(torch.cat([LEVELS, LEVELS / 2])),
        codebook(boundaries=torch.tensor([[-0.5, 0.0, 0.5]])),
        codebook(torch.tensor([[-1.0, 0.25, 1.0]]).half()),
        codebook(torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]]).half(), bits=3),
        mixed_codebook(),
    ],
    "floats": [
        Float8(channels=CHANNELS, scale=STEPS / 128),
        Float8(channels=CHANNELS, format="e5m2", scale=STEPS / 128),
        DynamicFloat8(channels=CHANNELS),
        DynamicFloat8(channels=CHANNELS, format="e5m2", group_size=4),
        BlockFloat(channels=CHANNELS),
        BlockFloat(channels=CHANNELS, format="nvfp4", tensor_scale=torch.full((1,), 2.0**-9)),
    ],
    "streams": [
        entropy_coded(shifted=False),
        entropy_coded(shifted=True),
        Streaming(channels=CHANNELS, bits=3, chunk_tokens=4, decay=0.5, outlier_threshold_relative=1.0625),
        Streaming(channels=CHANNELS, bits=4, high_bits=5, chunk_tokens=2, decay=0.0, groups=4),
    ],
    "sparse": sparse(),
    "transforms": transforms(),
    "predicted": [
        affine(),
        predicted(affine(4), "layers.0.key.pre_rope"),
        predicted(rotated(mixed_codebook(), basis(1.0, 1.0)), "layers.0.key.pre_rope layers.0.value", rank=2),
    ],
    "float16": [Identity(channels=CHANNELS), *sparse()[:3]],
    "bfloat16": [Identity(channels=CHANNELS), *sparse()[:3]],
    "float64": [Identity(channels=CHANNELS), sparse()[2]],
    "sinks": [
        exact_sinks(codebook()),
        exact_sinks(dynamic(per="channel", group_size=4)),
        exact_sinks(predicted(entropy_coded(shifted=True), "layers.0.value")),
    ],
    "sinks-bfloat16": [exact_sinks(sparse()[0])],
}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "sinks-bfloat16": torch.bfloat16,
}


def artifact(family: str) -> Artifact:
    """The quantizers of a family, one for each site."""
    sites = (Site(n // 2, "value") if n % 2 else Site(n // 2, "key", "pre_rope") for n in range(99))
    quantizers = dict(zip(sites, FAMILIES[family], strict=False))
    manifest = Manifest(
        specs={site: quantizer.spec for site, quantizer in quantizers.items()},
        model={"model_type": "llama"},
        model_id=None,
        corpus=CorpusRecord(name="none", digest="", n_windows=0, n_tokens=0, seqlen=0),
        recipe={"name": family},
        tool_version="0.0.0",
    )
    return Artifact(quantizers, manifest)


# --- codes


def encoded(quantizers: Mapping[Site, Quantizer], dtype: torch.dtype) -> Iterator[tuple[Site, Codes, Tensor]]:
    """Of every site the codes of some tokens, and what they are decoded to."""
    decoded: dict[Site, Tensor] = {}
    for number, (site, quantizer) in enumerate(quantizers.items()):
        context = tuple(decoded[source] for source in quantizer.sources)
        codes = quantizer.encode(tokens(dtype, first=number), context)
        decoded[site] = quantizer.decode(codes, context)
        yield site, codes, decoded[site]


def codes_file(quantizers: Mapping[Site, Quantizer], dtype: torch.dtype) -> Stored:
    """Codes as saved caches hold them, and decoded tensors."""
    pool = TensorPool()
    header = {
        str(site): {"codes": codes_record(codes, pool), "decoded": pool.add(decoded)}
        for site, codes, decoded in encoded(quantizers, dtype)
    }
    return Stored(format=CODES_FORMAT, header=header, arrays=pool.arrays())


def read_codes(path: Path) -> dict[Site, tuple[Codes, Tensor]]:
    """What `codes_file` put there."""
    stored = read(path, CODES_FORMAT)
    reader = CacheReader(stored.arrays, torch.device("cpu"))
    return {
        Site.parse(site): (reader.codes(row["codes"]), take(stored.arrays, row["decoded"]))
        for site, row in sorted(stored.header.items(), key=lambda item: Site.parse(item[0]))
    }


# --- words of mixed radix


def radices() -> list[list[int]]:
    """Numbers of levels, many of which can be cut in several ways into as many bits."""
    made = [[1 + (7 * j * j + 3 * j * seed) % (5 + 6 * seed) for j in range(24)] for seed in range(8)]
    return [[3, 1, 5, 10], [1, 1], [256] * 9, [2] * 60, [3] * 40, *made]


def words_file() -> Stored:
    """Codes and their bytes."""
    arrays = {}
    for number, n_levels in enumerate(radices()):
        places = torch.arange(3 * len(n_levels)).view(3, -1)
        codes = places * 37 % torch.tensor(n_levels)
        codes[0] = torch.tensor(n_levels) - 1
        arrays[f"{number}/codes"] = codes.to(torch.uint8).numpy()
        arrays[f"{number}/packed"] = MixedRadix(n_levels).pack(codes).numpy()
    arrays["0/first"] = MixedRadix([3, 1, 5, 10]).pack(torch.tensor([[2, 0, 4, 9]])).numpy()
    return Stored(format="kvgauge.golden.words", header={"n_levels": radices()}, arrays=arrays)


# --- saved caches


@dataclass(frozen=True)
class CacheCase:
    """Quantizers for keys and values, a policy, and the dtype of the model."""

    key: Quantizer
    value: Quantizer
    policy: CachePolicy
    dtype: torch.dtype = torch.float32
    suffix: str = ".safetensors"


_EVICTION = Eviction(
    prefill="snapkv",
    prefill_tokens=14,
    prefill_recent_tokens=4,
    decoding="slide",
    decoding_tokens=4,
    decoding_recent_tokens=2,
)
_IN_FOURS = CachePolicy(sink_tokens=1, residual_tokens=2, block_tokens=4)
CACHES = {
    "words": CacheCase(mixed_codebook(), sparse()[2], CachePolicy(sink_tokens=1, residual_tokens=3)),
    "half": CacheCase(affine(), Identity(channels=CHANNELS), CachePolicy(sink_tokens=1), torch.bfloat16),
    "double": CacheCase(affine(), Identity(channels=CHANNELS), CachePolicy(sink_tokens=1), torch.float64),
    "groups": CacheCase(dynamic(per="channel", group_size=4), entropy_coded(shifted=True), _IN_FOURS, suffix=".pkl"),
    "running": CacheCase(FAMILIES["streams"][2], sparse()[1], _IN_FOURS),
    "small-norms": CacheCase(dynamic(), affine(), CachePolicy(sink_tokens=1, keep_smallest_norm=2)),
    "evicted": CacheCase(sparse()[0], transforms()[0], CachePolicy(eviction=_EVICTION)),
}


@contextmanager
def new_cache(case: CacheCase) -> Iterator[PackedCache]:
    """An empty cache of a model of one layer, whose weights are the same everywhere."""
    model = random_llama(num_hidden_layers=1, head_dim=4).to(case.dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(((torch.arange(weight.numel()) * 37 % 129) - 64).view_as(weight) / 256)
    quantizers = {Site(0, "key", "pre_rope"): case.key, Site(0, "value"): case.value}
    quantizers = {site: quantizer.at(site) for site, quantizer in quantizers.items()}
    with packed_cache(model, quantizers, policy=case.policy) as new:
        yield new()


def fill(cache: PackedCache, case: CacheCase) -> None:
    """Two sequences of 11 and 9 tokens in two steps, padded on the left, without the model's own arithmetic."""
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :2] = False
    key, value = (
        torch.stack([tokens(case.dtype, 11, first=first + 5 * row) for row in range(2)]).view(2, 11, 2, 4)
        for first in (0, 100)
    )
    [layer] = cache.layers
    for part in (slice(0, 7), slice(7, 11)):
        own = real[:, part]
        layer.store.append(key[:, part].transpose(1, 2), value[:, part].transpose(1, 2), own)
        layer.store.end_step()
    if case.policy.eviction is not None:
        keep = torch.arange(11) % 3 != 1
        streams = layer.store.sequences
        layer.store.sequences = [stream.keep(keep[stream.n_padding :]).after_prompt() for stream in streams]
    angles = (torch.arange(11 * 2) % 5 / 4).view(1, 11, 2).to(case.dtype)
    table = torch.stack([torch.cat([angles, angles], dim=-1), torch.cat([angles, -angles], dim=-1)])
    cache.tables = RotaryTables([table], {0: 0})


def save_golden_cache(cache: PackedCache, path: Path) -> None:
    with patch("simquant.cache.saving.saved_cache.tool_version", lambda: "0.0.0"):
        save_cache(cache, path)


def what_is_read(cache: PackedCache) -> Stored:
    """Keys and values of every sequence, as attention reads them."""
    pool = TensorPool()
    [layer] = cache.layers
    header = {
        f"{row}.{name}": pool.add(store.read(0, store.n_tokens).clone())
        for row, stream in enumerate(layer.store.sequences)
        for name, store in (("key", stream.key), ("value", stream.value))
    }
    return Stored(format="kvgauge.golden.read", header=header, arrays=pool.arrays())


# --- all of them


def write_missing(folder: Path) -> None:
    """Writes the files that are not there."""
    with tempfile.TemporaryDirectory() as name:
        write_all(Path(name))
        for path in Path(name).iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())


def write_all(folder: Path) -> None:
    """Writes all files as they are written today."""
    for family in FAMILIES:
        save(artifact(family), folder / f"{family}.safetensors")
        found = load(folder / f"{family}.safetensors")
        write(folder / f"{family}.codes.safetensors", codes_file(found, DTYPES.get(family, torch.float32)))
    write(folder / "words.safetensors", words_file())
    for name, case in CACHES.items():
        with new_cache(case) as cache:
            fill(cache, case)
            save_golden_cache(cache, folder / f"cache-{name}{case.suffix}")
            write(folder / f"cache-{name}.read.safetensors", what_is_read(cache))


if __name__ == "__main__":
    write_missing(GOLDEN)
