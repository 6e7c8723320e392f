"""The formats are frozen: committed bytes decode to committed tensors, and what is written today is those bytes.

`tests/golden/README.md` tells what the files are and when new ones are added.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden_files import (
    ARTIFACT_FILES,
    CACHES,
    CODES_FORMAT,
    DTYPES,
    FAMILIES,
    GOLDEN,
    artifact,
    codes_file,
    encoded,
    fill,
    new_cache,
    read_codes,
    save_golden_cache,
    tokens,
    what_is_read,
    words_file,
    write_all,
)
from torch import Tensor

from artifacts.artifact import load, save
from artifacts.codes import Codes
from artifacts.coding.mixed_radix import MixedRadix
from artifacts.registry import KINDS
from artifacts.spec import QuantSpec
from artifacts.storage import Stored, read, write
from simquant import load_cache
from simquant.cache.saving.tensor_pool import take

pytestmark = pytest.mark.shapes

every_family = pytest.mark.parametrize("family", FAMILIES)
every_cache = pytest.mark.parametrize("name", CACHES)


def chain(spec: QuantSpec) -> Iterator[QuantSpec]:
    yield spec
    if spec.inner is not None:
        yield from chain(spec.inner)


def frozen_specs() -> list[QuantSpec]:
    specs = [load(GOLDEN / f"{family}.safetensors").manifest.specs.values() for family in FAMILIES]
    return [part for family in specs for spec in family for part in chain(spec)]


def assert_same_content(one: Stored, other: Stored) -> None:
    assert one.header == other.header
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype, name
        assert np.array_equal(array, other.arrays[name]), name


def assert_same_codes(one: Codes, other: Codes) -> None:
    assert (one.shape, one.dtype, one.spans) == (other.shape, other.dtype, other.spans)
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name]), name
    assert (one.inner is None) == (other.inner is None)
    if one.inner is not None:
        assert_same_codes(one.inner, other.inner)


# --- that none is missing


def test_every_kind_has_golden_codes() -> None:
    assert {spec.kind for spec in frozen_specs()} == set(KINDS), "add it to FAMILIES of tests/helpers/golden_files.py"


def test_every_packing_has_golden_codes() -> None:
    specs = frozen_specs()
    assert {spec.options["bits"] for spec in specs if spec.kind == "affine"} == set(range(1, 9))
    assert {spec.options["per"] for spec in specs if spec.kind == "dynamic_affine"} == {"token", "channel", "tensor"}
    assert {spec.options.get("format") for spec in specs} == {None, "e4m3", "e5m2", "mxfp4", "nvfp4"}
    dtypes = {
        codes.dtype for family in FAMILIES for codes, _ in read_codes(GOLDEN / f"{family}.codes.safetensors").values()
    }
    assert dtypes == {torch.float32, *DTYPES.values()}


def test_the_folder_holds_what_is_written_and_little_of_it(tmp_path: Path) -> None:
    write_all(tmp_path)
    files = {path.name: path for path in GOLDEN.iterdir()}
    assert files.keys() == {path.name for path in tmp_path.iterdir()} | ARTIFACT_FILES | {"README.md"}
    assert all(path.stat().st_size < 7000 for path in files.values())


# --- quantizers and their codes


@every_family
def test_golden_codes_decode_to_golden_tensors(family: str) -> None:
    quantizers, frozen = load(GOLDEN / f"{family}.safetensors"), read_codes(GOLDEN / f"{family}.codes.safetensors")
    assert list(frozen) == list(quantizers)
    decoded: dict[object, Tensor] = {}
    for site, quantizer in quantizers.items():
        codes, expected = frozen[site]
        decoded[site] = quantizer.decode(codes, tuple(decoded[source] for source in quantizer.sources))
        assert decoded[site].dtype == expected.dtype == codes.dtype
        assert torch.equal(decoded[site], expected), site


@every_family
def test_quantizers_still_encode_to_golden_codes(family: str) -> None:
    quantizers, frozen = load(GOLDEN / f"{family}.safetensors"), read_codes(GOLDEN / f"{family}.codes.safetensors")
    for site, codes, _ in encoded(quantizers, DTYPES.get(family, torch.float32)):
        assert_same_codes(codes, frozen[site][0])


@every_family
def test_what_is_written_today_is_the_golden_file(family: str, tmp_path: Path) -> None:
    save(artifact(family), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (GOLDEN / f"{family}.safetensors").read_bytes()
    write(tmp_path / "c.safetensors", codes_file(artifact(family), DTYPES.get(family, torch.float32)))
    frozen = GOLDEN / f"{family}.codes.safetensors"
    assert_same_content(read(tmp_path / "c.safetensors", CODES_FORMAT), read(frozen, CODES_FORMAT))
    assert (tmp_path / "c.safetensors").read_bytes() == frozen.read_bytes()


def test_outliers_and_escapes_are_among_the_golden_codes() -> None:
    """What is rare is frozen, too: values beyond all tables and ranges, promoted channels, a last short group."""
    streams = read_codes(GOLDEN / "streams.codes.safetensors")
    [coded, _, promoted, _] = [codes for codes, _ in streams.values()]
    assert promoted.tensors["promoted"].any()
    assert len(promoted.tensors["high_codes"])
    assert coded.shape[0] % 4
    quantizers = load(GOLDEN / "streams.safetensors")
    assert quantizers[next(iter(quantizers))].outside(tokens()).any()


# --- words of mixed radix


def test_golden_words_hold_golden_codes() -> None:
    frozen = read(GOLDEN / "words.safetensors", words_file().format)
    for number, n_levels in enumerate(frozen.header["n_levels"]):
        codes, packed = (torch.from_numpy(frozen.arrays[f"{number}/{name}"].copy()) for name in ("codes", "packed"))
        radix = MixedRadix(n_levels)
        assert torch.equal(radix.unpack(packed), codes), n_levels
        assert torch.equal(radix.pack(codes), packed), n_levels
    assert_same_content(words_file(), frozen)


def test_of_equal_cuts_the_one_with_the_longest_first_word_is_frozen() -> None:
    """It was the shortest first word for a while, under the same version: 198, which today stands for other codes."""
    assert read(GOLDEN / "words.safetensors", words_file().format).arrays["0/first"].tolist() == [[149]]
    assert MixedRadix([3, 1, 5, 10]).unpack(torch.tensor([[149]], dtype=torch.uint8)).tolist() == [[2, 0, 4, 9]]


# --- saved caches


@every_cache
def test_a_golden_cache_is_read_as_it_was(name: str) -> None:
    case = CACHES[name]
    frozen = read(GOLDEN / f"cache-{name}.read.safetensors", "kvgauge.golden.read")
    with new_cache(case) as cache:
        loaded = load_cache(GOLDEN / f"cache-{name}{case.suffix}", cache)
        assert_same_content(what_is_read(loaded), frozen)
        rows = [take(frozen.arrays, place) for place in frozen.header.values()]
        assert {row.dtype for row in rows} == {case.dtype}


@every_cache
def test_the_same_cache_is_still_the_golden_file(name: str, tmp_path: Path) -> None:
    case = CACHES[name]
    with new_cache(case) as cache:
        fill(cache, case)
        save_golden_cache(cache, tmp_path / f"c{case.suffix}")
    assert (tmp_path / f"c{case.suffix}").read_bytes() == (GOLDEN / f"cache-{name}{case.suffix}").read_bytes()
