"""The file: what is written is read back bit for bit, and nothing else is ever read.

`tests/golden/` freezes format 1: two files with the same small artifact, and what its quantizers store and give back.
After a deliberate change of the format (a new version number, never the same) write them again with

    PYTHONPATH=.:tests python tests/artifacts/test_artifact.py
"""

import errno
import itertools
import json
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.golden_files import ARTIFACT_FILES
from torch import Tensor

import artifacts
from artifacts.artifact import FORMAT, Artifact, load, save
from artifacts.codes import Codes
from artifacts.coding.span import Span
from artifacts.errors import (
    ArtifactError,
    CorruptArtifactError,
    MismatchError,
    UnknownKindError,
    UnsupportedVersionError,
)
from artifacts.inspect import differences, report, table
from artifacts.manifest import CorpusRecord, Manifest, SinkChoice
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.sparse import PercentileSparse, RankSparse, ThresholdSparse
from artifacts.sites import Site
from artifacts.storage import SUFFIXES, Stored, canonical_json, read, write

pytestmark = pytest.mark.shapes

GOLDEN = Path(__file__).parents[1] / "golden"
CHANNELS = 8
KEY, VALUE = Site(0, "key", "pre_rope"), Site(0, "value")

either_format = pytest.mark.parametrize("suffix", SUFFIXES)


def manifest(quantizers: dict[Site, Quantizer]) -> Manifest:
    return Manifest(
        specs={site: quantizer.spec for site, quantizer in quantizers.items()},
        model={"model_type": "llama", "n_layers": 3, "rope": {"theta": 10000.0}, "tokenizer": "ab12"},
        model_id="demo",
        corpus=CorpusRecord(name="text.txt", digest="cd34", n_windows=4, n_tokens=64, seqlen=16, seed=0),
        recipe={"name": "made-up", "source": "tests"},
        sink_tokens=1,
        fit_sources={str(site): "nothing" for site in quantizers},
        tool_version="0.0.0",
    )


def quantizers() -> dict[Site, Quantizer]:
    """One of every kind; all numbers are sums of few powers of two, so that no machine rounds them differently."""
    steps = 1 + torch.arange(CHANNELS) / 8
    levels = torch.tensor([[-1.0, -0.5, 0.25, 1.0]]).half()
    codebook = Codebook(channels=CHANNELS, bits=2, scale=2 * steps, offset=steps / 4, levels=levels)
    affine = Affine(channels=CHANNELS, bits=3, scale=steps / 2, offset=-2 * steps)
    dynamic = DynamicAffine(channels=CHANNELS, bits=4)
    per_token = DynamicCodebook(channels=CHANNELS, bits=2, levels=levels)
    return {
        KEY: ThresholdSparse(channels=CHANNELS, inner=codebook, lower=-3 * steps, upper=2.5 * steps),
        VALUE: PercentileSparse(channels=CHANNELS, inner=per_token, outlier_fraction=0.125),
        Site(1, "key", "pre_rope"): affine,
        Site(1, "value"): RankSparse(channels=CHANNELS, inner=dynamic, outliers_per_token=1),
        Site(2, "key", "post_rope"): Affine(channels=CHANNELS, bits=4, scale=steps / 4),
        Site(2, "value"): Identity(channels=CHANNELS),
    }


def artifact(**changes: Any) -> Artifact:
    found = quantizers()
    return Artifact(found, replace(manifest(found), **changes), ngrams=torch.arange(16, dtype=torch.uint8))


def tokens() -> Tensor:
    """Five tokens of multiples of 1/16 between -4 and 4."""
    return ((torch.arange(5 * CHANNELS) * 37 % 129) - 64).view(5, CHANNELS) / 16


def save_to(folder: Path, suffix: str = ".safetensors") -> Path:
    path = folder / f"q{suffix}"
    save(artifact(), path)
    return path


def assert_same_artifact(one: Artifact, other: Artifact) -> None:
    assert one.manifest == other.manifest
    assert one.digest == other.digest
    assert list(one) == list(other)
    assert torch.equal(one.ngrams, other.ngrams)
    for site in one:
        mine, others = one[site].tensors(), other[site].tensors()
        assert mine.keys() == others.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == others[name].dtype
            assert torch.equal(tensor, others[name])
        assert torch.equal(one[site].simulate(tokens()), other[site].simulate(tokens()))


# ---- there and back


@either_format
def test_load_gives_back_what_was_saved(tmp_path: Path, suffix: str) -> None:
    assert_same_artifact(load(save_to(tmp_path, suffix)), artifact())


CHOICE = SinkChoice(reason="1 of at most 2: it pays", errors=[0.3, 0.1, 0.1], bits=[4.0, 4.006, 4.012])


@either_format
def test_a_chosen_number_of_sinks_is_saved_with_its_reason(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"q{suffix}"
    save(artifact(sink_choice=CHOICE), path)
    assert_same_artifact(load(path), artifact(sink_choice=CHOICE))
    found = report(read(path, FORMAT))
    assert found["sink_choice"] == {"reason": CHOICE.reason, "errors": CHOICE.errors, "bits": CHOICE.bits}
    assert "sinks      first 1 tokens in full precision and left out of the fit; auto: 1 of at most 2: it pays\n" in (
        table(found)
    )


def test_a_number_of_sinks_that_was_given_has_no_reason() -> None:
    stored = artifact()._stored()
    assert "sink_choice" not in stored.header
    assert "left out of the fit\n" in table(report(stored))


def test_loading_builds_each_quantizer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were built and checked again to be given the site that they had."""
    path, checked = save_to(tmp_path), []
    original = Quantizer.__post_init__
    monkeypatch.setattr(Quantizer, "__post_init__", lambda self: (checked.append(self), original(self)))
    found = load(path)
    Artifact(found, found.manifest)
    assert len(checked) == sum(1 + (quantizer.spec.inner is not None) for quantizer in found.values())


@either_format
def test_same_content_same_bytes(tmp_path: Path, suffix: str) -> None:
    first = save_to(tmp_path, suffix).read_bytes()
    assert save_to(tmp_path, suffix).read_bytes() == first
    save(load(tmp_path / f"q{suffix}"), tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == first


@either_format
def test_order_of_sites_is_of_no_account(tmp_path: Path, suffix: str) -> None:
    backwards = dict(reversed(quantizers().items()))
    other = Artifact(backwards, manifest(backwards), ngrams=artifact().ngrams)
    assert list(other) == sorted(backwards)
    save(other, tmp_path / f"other{suffix}")
    assert (tmp_path / f"other{suffix}").read_bytes() == save_to(tmp_path, suffix).read_bytes()


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    paths = [save_to(tmp_path, suffix) for suffix in SUFFIXES]
    assert load(paths[0]).digest == load(paths[1]).digest == artifact().digest
    assert differences(*[read(path, FORMAT) for path in paths]) == []
    for one, other in itertools.permutations(paths):
        converted = tmp_path / f"converted{other.suffix}"
        save(load(one), converted)
        assert converted.read_bytes() == other.read_bytes()


@either_format
def test_content_decides_on_reading(tmp_path: Path, suffix: str) -> None:
    renamed = save_to(tmp_path, suffix).rename(tmp_path / "q.bin")
    assert_same_artifact(load(renamed), artifact())


@either_format
def test_unusual_arrays_survive(tmp_path: Path, suffix: str) -> None:
    arrays = {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(-0.0),
        "nan": np.array([np.nan, np.inf], np.float16),
        "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "flags": np.array([True, False]),
    }
    stored = Stored(format="test", header={"text": "Größe \ud800"}, arrays=arrays)
    write(tmp_path / f"x{suffix}", stored)
    found = read(tmp_path / f"x{suffix}", "test")
    assert (found.header, found.digest) == (stored.header, stored.digest)
    for name, array in arrays.items():
        assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
        assert found.arrays[name].tobytes() == array.tobytes()


def test_digest_depends_on_everything() -> None:
    base = Stored(format="f", header={"a": 1}, arrays={"x": np.zeros(4, np.int16)})
    others = [
        replace(base, format="g"),
        replace(base, header={"a": 2}),
        replace(base, arrays={}),
        replace(base, arrays={"y": np.zeros(4, np.int16)}),
        replace(base, arrays={"x": np.zeros((2, 2), np.int16)}),
        replace(base, arrays={"x": np.zeros(4, np.float16)}),
        replace(base, arrays={"x": np.array([0, 0, 0, 1], np.int16)}),
    ]
    assert len({stored.digest for stored in [base, *others]}) == len(others) + 1


def test_manifest_must_describe_the_quantizers() -> None:
    found = quantizers()
    with pytest.raises(CorruptArtifactError, match="must describe its quantizers; it differs at layers"):
        Artifact({KEY: found[KEY]}, manifest(found))


def test_quantizers_of_an_artifact_know_their_site() -> None:
    for site, quantizer in artifact().items():
        assert quantizer.site == site
        assert getattr(quantizer, "inner", quantizer).site == site


# ---- writing


@pytest.mark.parametrize("name", ["q.npz", "q", "q.safetensors.gz", "q.PKL"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=r"ends in \.safetensors or \.pkl, got '.*'") as caught:
        save(artifact(), tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@either_format
def test_folders_are_made(tmp_path: Path, suffix: str) -> None:
    save(artifact(), tmp_path / "a" / "b" / f"q{suffix}")
    assert load(tmp_path / "a" / "b" / f"q{suffix}").digest == artifact().digest


@either_format
@pytest.mark.parametrize("step", ["replace", "fdopen"])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, suffix: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_to(tmp_path, suffix)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        save(artifact(model_id=None), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@either_format
@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022])
def test_files_are_as_private_as_the_umask_asks(tmp_path: Path, suffix: str, umask: int) -> None:
    """They were readable by everyone, whatever it said."""
    before = os.umask(umask)
    try:
        path = save_to(tmp_path, suffix)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename can reach the disk before the content does: after a loss of power the file was empty."""
    done = []
    flush, rename = os.fsync, os.replace

    def flushed(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"{os.fstat(handle).st_size > 0}")
        flush(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), rename(*paths)))
    save_to(tmp_path)
    assert done == ["True", "renamed", "folder"]


def test_a_folder_that_takes_no_file_is_an_error_about_the_wanted_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the message named a temporary file that nobody had asked for."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/folder/.q.pkl.x1y2")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=rf"^{tmp_path}/q.pkl: cannot write into {tmp_path} \(Permission denied\)$"):
        save(artifact(), tmp_path / "q.pkl")


# ---- another model


def test_the_same_model_passes() -> None:
    fingerprint = dict(artifact().manifest.model)
    artifact().check_model(fingerprint)
    del fingerprint["tokenizer"]  # unknown, not different
    artifact().check_model(fingerprint)


@pytest.mark.parametrize("recipe", [{}, {"name": "made-up"}])
def test_an_artifact_that_says_nothing_of_a_model_passes_with_a_warning(
    recipe: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """A manifest without model and recipe ended in KeyError: 'source'."""
    artifact(model={}, recipe=recipe).check_model({"model_type": "llama"})
    assert "imported from an unknown tool, without the fingerprint of a model" in caplog.text


def test_check_model_lists_every_difference() -> None:
    other = {"model_type": "llama", "n_layers": 4, "rope": {"theta": 500000.0}, "vocab_size": 9, "tokenizer": "ef56"}
    with pytest.raises(MismatchError) as caught:
        artifact().check_model(other)
    assert str(caught.value).splitlines()[1:] == [
        "  n_layers: artifact 3, model 4",
        "  rope: artifact {'theta': 10000.0}, model {'theta': 500000.0}",
        "  tokenizer: artifact 'ab12', model 'ef56'",
        "  vocab_size: artifact None, model 9",
    ]


# ---- damaged files: accidents


def read_or_refuse(path: Path) -> str | None:
    """The digest of what was read, or None if it was refused as it should be: with the path, as an ArtifactError."""
    try:
        return load(path).digest
    except ArtifactError as error:
        named = str(path) in str(error)
    assert named
    return None


@either_format
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = save_to(tmp_path, suffix)
    data = path.read_bytes()
    for length in [*range(1, 40), *range(40, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CorruptArtifactError) as caught:
            load(path)
        assert str(path) in str(caught.value)


@either_format
def test_appended_bytes_are_refused(tmp_path: Path, suffix: str) -> None:
    path = save_to(tmp_path, suffix)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CorruptArtifactError, match="damaged or incomplete"):
        load(path)


@either_format
def test_flipped_bits_never_give_another_artifact(tmp_path: Path, suffix: str) -> None:
    path, expected = save_to(tmp_path, suffix), artifact().digest
    data, choose = path.read_bytes(), random.Random(7)
    refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        digest = read_or_refuse(path)
        assert digest in (None, expected)  # the same is possible: the length of a frame, a space between JSON words
        refused += digest is None
    assert refused > 90


# ---- files of other tools, and of people who mean harm


class RunsCode:
    """Pickled, it asks the reader to make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"mkdir {self.path}",)


def raw(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def safetensors_file(header: object, data: bytes = b"") -> Callable[[Path], None]:
    text = json.dumps(header).encode()
    return raw(struct.pack("<Q", len(text)) + text + data)


def pickle_file(content: Callable[[Path], object], protocol: int = 4) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(pickle.dumps(content(path), protocol)) and None


def plain_pickle(text: object, rows: object) -> Callable[[Path], None]:
    """A pickle in the very instructions that kvgauge writes."""

    def put(path: Path) -> None:
        with path.open("wb") as file:
            pickler = pickle.Pickler(file, 4)
            pickler.fast = True
            pickler.dump({"kvgauge": text, "arrays": rows})

    return put


def statistics(path: Path) -> None:
    stored = artifact()._stored()
    write(path.with_suffix(".pkl"), replace(stored, format="kvgauge.statistics"))
    path.with_suffix(".pkl").rename(path)


def header_text(**top: Any) -> str:
    stored = artifact()._stored()
    whole = {"format": FORMAT, "version": 1, "digest": stored.digest, "header": stored.header}
    return json.dumps({**whole, **top})


FOREIGN: dict[str, tuple[Callable[[Path], object], type[ArtifactError], str]] = {
    "missing": (lambda path: None, CorruptArtifactError, "cannot be read"),
    "empty": (raw(b""), CorruptArtifactError, "is empty"),
    "directory": (lambda path: path.mkdir(), CorruptArtifactError, "got a directory"),
    "text": (raw(b"hello, this is text"), CorruptArtifactError, "expected a safetensors file or a pickle"),
    "lfs-pointer": (
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        CorruptArtifactError,
        "git lfs pull",
    ),
    "torch-save": (lambda path: torch.save({"a": torch.ones(2)}, path), CorruptArtifactError, "zip"),
    "model-weights": (
        lambda path: safetensors.torch.save_file({"w": torch.ones(3)}, path),
        CorruptArtifactError,
        "model weights",
    ),
    "weights-with-metadata": (
        lambda path: safetensors.torch.save_file({"w": torch.ones(3)}, path, {"format": "pt"}),
        CorruptArtifactError,
        "model weights",
    ),
    "statistics": (statistics, CorruptArtifactError, "expected a file of format kvgauge.artifact, got 'kvgauge.stat"),
    "bfloat16": (
        safetensors_file({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"\0\0"),
        CorruptArtifactError,
        "damaged or incomplete safetensors file",
    ),
    "runs-code": (pickle_file(lambda path: RunsCode(path.parent / "harm")), CorruptArtifactError, "executed"),
    "runs-code-inside": (
        pickle_file(lambda path: {"kvgauge": header_text(), "arrays": [RunsCode(path.parent / "harm")]}),
        CorruptArtifactError,
        "executed",
    ),
    "runs-code-old": (pickle_file(lambda path: RunsCode(path.parent / "harm"), 2), CorruptArtifactError, "executed"),
    "pickled-tensor": (pickle_file(lambda path: {"a": torch.ones(2)}), CorruptArtifactError, "another tool"),
    "pickled-list": (plain_pickle("{}", [1, 2]), CorruptArtifactError, "not one written by kvgauge"),
    "pickled-number": (raw(pickle.dumps(7, 4)), CorruptArtifactError, "not one written by kvgauge"),
    # One instruction makes the reader reserve 16 GiB for its memo.
    "memo-bomb": (raw(b"\x80\x04]r\xff\xff\xff\x7f."), CorruptArtifactError, "LONG_BINPUT"),
    # Forty lists, each twice in the next: printing the innermost would take a terabyte.
    "laughs": (
        raw(b"\x80\x04]\x94" + b"".join(b"]\x94(h%ch%ce" % (n, n) for n in range(40)) + b"."),
        CorruptArtifactError,
        "MEMOIZE",
    ),
    "deep": (raw(b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."), CorruptArtifactError, "not one written by"),
    "row-of-many": (plain_pickle(header_text(), [("a", "float32", (1,), b"0123", 5)]), CorruptArtifactError, "kvgauge"),
    "object-array": (plain_pickle(header_text(), [("a", "object", (1,), b"01234567")]), CorruptArtifactError, "dtype"),
    "wrong-size": (
        plain_pickle(header_text(), [("a", "float32", (2,), b"0123")]),
        CorruptArtifactError,
        "not one written by kvgauge",
    ),
    "huge-shape": (
        plain_pickle(header_text(), [("a", "uint8", (2**70,), b"0")]),
        CorruptArtifactError,
        "not one written by kvgauge",
    ),
    "not-json": (plain_pickle("{", []), CorruptArtifactError, "header is not the JSON object"),
    "json-list": (plain_pickle("[]", []), CorruptArtifactError, "header is not the JSON object"),
    "json-deep": (plain_pickle("[" * 100_000, []), CorruptArtifactError, "header is not the JSON object"),
    "json-nan": (plain_pickle(header_text(header={"a": float("nan")}), []), CorruptArtifactError, "JSON"),
    "json-overflow": (plain_pickle(header_text().replace("10000.0", "1e999"), []), CorruptArtifactError, "JSON"),
    "no-digest": (plain_pickle('{"format":"kvgauge.artifact","version":1}', []), CorruptArtifactError, "JSON"),
    "wrong-digest": (plain_pickle(header_text(digest="0" * 64), []), CorruptArtifactError, "does not match its digest"),
    "header-list": (plain_pickle(header_text(header=[]), []), CorruptArtifactError, "does not match its digest"),
    "newer": (
        plain_pickle(header_text(version=2), []),
        UnsupportedVersionError,
        "format version 2; this kvgauge reads",
    ),
    "version-text": (plain_pickle(header_text(version="1"), []), UnsupportedVersionError, "format version '1'"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused(tmp_path: Path, name: str) -> None:
    put, error, _ = FOREIGN[name]
    path = tmp_path / "q.safetensors"
    put(path)
    with pytest.raises(error) as caught:
        load(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_a_directory_names_the_file_in_it(tmp_path: Path) -> None:
    path = save_to(tmp_path)
    with pytest.raises(CorruptArtifactError, match=r"Did you mean .*q\.safetensors\?"):
        load(path.parent)


# ---- files with a right digest and wrong content

Arrays = dict[str, np.ndarray]
Header = dict[str, Any]


def set_array(name: str, value: Any, dtype: str = "float32") -> Callable[[Header, Arrays], None]:
    def change(header: Header, arrays: Arrays) -> None:
        arrays[name] = np.asarray(value, dtype)

    return change


def drop_array(name: str) -> Callable[[Header, Arrays], None]:
    return lambda header, arrays: arrays.pop(name) is None or None


def set_spec(site: Site, /, *, wrapped: bool = False, **changes: Any) -> Callable[[Header, Arrays], None]:
    """Changes `kind` or options of one specification; None removes an option."""

    def change(header: Header, arrays: Arrays) -> None:
        spec = header["specs"][str(site)]
        spec = spec["inner"] if wrapped else spec
        spec["kind"] = changes.get("kind", spec["kind"])
        options = {**spec["options"], **changes}
        options.pop("kind", None)
        spec["options"] = {name: value for name, value in options.items() if value is not None}

    return change


def set_header(**changes: Any) -> Callable[[Header, Arrays], None]:
    return lambda header, arrays: header.update(changes)


def set_corpus(**changes: Any) -> Callable[[Header, Arrays], None]:
    return lambda header, arrays: header["corpus"].update(changes)


def rename_site(header: Header, arrays: Arrays) -> None:
    header["specs"]["layers.0.value.pre_rope"] = header["specs"].pop("layers.0.value")


def nest(header: Header, arrays: Arrays) -> None:
    spec = header["specs"]["layers.2.value"]
    for _ in range(300):
        spec = {"kind": "rank_sparse", "options": {"channels": CHANNELS, "outliers_per_token": 1}, "inner": spec}
    header["specs"]["layers.2.value"] = spec


K0, V0, K1, V1, V2 = KEY, VALUE, Site(1, "key", "pre_rope"), Site(1, "value"), Site(2, "value")
LEVELS = [[-1.0, -0.5, 0.25, 1.0]]
WRONG: dict[str, tuple[Callable[[Header, Arrays], None], type[ArtifactError], str]] = {
    "kind": (set_spec(K1, kind="afine"), UnknownKindError, "unknown kind of quantizer 'afine'"),
    "kind-inside": (set_spec(K0, wrapped=True, kind="pca"), UnknownKindError, "unknown kind of quantizer 'pca'"),
    "kind-number": (set_spec(K1, kind=7), CorruptArtifactError, "kind must be a name"),
    "bits-missing": (set_spec(K1, bits=None), CorruptArtifactError, "bits"),
    "bits-9": (set_spec(K1, bits=9), CorruptArtifactError, "bits must be an integer from 1 to 8"),
    "bits-real": (set_spec(K1, bits=3.0), CorruptArtifactError, "bits must be of type int; got 3.0"),
    "bits-text": (set_spec(V1, wrapped=True, bits="4"), CorruptArtifactError, "bits must be of type int; got '4'"),
    "bits-huge": (set_spec(K1, bits=10**15), CorruptArtifactError, "bits"),
    "channels-real": (set_spec(V2, channels=8.0), CorruptArtifactError, "channels must be of type int"),
    "channels-none": (set_spec(V2, channels=0), CorruptArtifactError, "channels must be at least 1"),
    "channels-inside": (set_spec(V1, wrapped=True, channels=9), CorruptArtifactError, "a quantizer of 8 channels"),
    "flag-text": (
        set_spec(V1, wrapped=True, symmetric="no"),
        CorruptArtifactError,
        "symmetric must be of type bool; got 'no'",
    ),
    "option-list": (set_spec(K1, bits=[3]), CorruptArtifactError, "option 'bits' must be"),
    "option-unknown": (set_spec(K1, colour="red"), CorruptArtifactError, "colour"),
    "option-site": (set_spec(K1, site="layers.0.value"), CorruptArtifactError, "site"),
    "option-for-tensor": (set_spec(V2, inner="identity"), CorruptArtifactError, "inner"),
    "fraction-one": (set_spec(V0, outlier_fraction=1.0), CorruptArtifactError, "outlier_fraction must be in"),
    "outliers-many": (set_spec(V1, outliers_per_token=8), CorruptArtifactError, "from 1 to 7; got 8"),
    "scale-negative": (set_array(f"{K1}/scale", [-1.0] * 8), CorruptArtifactError, "finite and positive; 8 of 8"),
    "scale-nan": (set_array(f"{K1}/scale", [np.nan] + [1.0] * 7), CorruptArtifactError, "finite and positive; 1 of 8"),
    "scale-short": (
        set_array(f"{K1}/scale", [1.0] * 7),
        CorruptArtifactError,
        "scale must be float32 of shape (8,); got torch.float32 of shape (7,)",
    ),
    "scale-double": (
        set_array(f"{K1}/scale", [1.0] * 8, "float64"),
        CorruptArtifactError,
        "scale must be float32 of shape (8,); got torch.float64",
    ),
    "scale-missing": (drop_array(f"{K1}/scale"), CorruptArtifactError, "scale"),
    "offset-infinite": (set_array(f"{K1}/offset", [np.inf] * 8), CorruptArtifactError, "offset must be finite"),
    "levels-unsorted": (
        set_array(f"{V0}/inner.levels", [[0.0, 2.0, 1.0, 3.0]], "float16"),
        CorruptArtifactError,
        "ascending",
    ),
    "levels-few": (
        set_array(f"{V0}/inner.levels", [[0.0, 1.0]], "float16"),
        CorruptArtifactError,
        "levels must be float16, more than 2 and at most 4 of them",
    ),
    "levels-flat": (
        set_array(f"{V0}/inner.levels", [0.0, 1.0, 2.0, 3.0], "float16"),
        CorruptArtifactError,
        "levels must be float16, more than 2 and at most 4 of them",
    ),
    "levels-single": (
        set_array(f"{V0}/inner.levels", LEVELS),
        CorruptArtifactError,
        "levels must be float16, more than 2 and at most 4 of them",
    ),
    "thresholds-crossed": (set_array(f"{K0}/lower", [9.0] * 8), CorruptArtifactError, "lower must not exceed upper"),
    "array-extra": (set_array(f"{K1}/shift", [0.0] * 8), CorruptArtifactError, "shift"),
    "array-for-option": (set_array(f"{V1}/inner.symmetric", [0.0, 1.0]), CorruptArtifactError, "symmetric"),
    "array-for-inner": (set_array(f"{V2}/inner.scale", [1.0] * 8), CorruptArtifactError, "no wrapped quantizer"),
    "array-unnamed": (set_array(f"{K1}/", [1.0] * 8), CorruptArtifactError, str(K1)),
    "array-of-no-site": (set_array("layers.9.value/scale", [1.0] * 8), CorruptArtifactError, "layers.9.value"),
    "array-stray": (set_array("scale", [1.0] * 8), CorruptArtifactError, "got arrays of ['scale'] without one"),
    "array-of-corpus": (set_array("corpus/secret", [1.0] * 8), CorruptArtifactError, "['corpus']"),
    "array-dtype": (set_array(f"{K1}/scale", [1] * 8, "uint32"), CorruptArtifactError, "dtype"),
    "site-name": (rename_site, CorruptArtifactError, "stage='pre_rope'"),
    "no-sites": (set_header(specs={}), CorruptArtifactError, "sites"),
    "specs-list": (set_header(specs=[]), CorruptArtifactError, "manifest"),
    "extra-field": (set_header(note="hello"), CorruptArtifactError, "note"),
    "model-number": (set_header(model=5), CorruptArtifactError, "model must be of type"),
    "recipe-null": (set_header(recipe=None), CorruptArtifactError, "recipe must be of type"),
    "model-id-list": (set_header(model_id=["demo"]), CorruptArtifactError, "model_id must be of type"),
    "sinks-negative": (set_header(sink_tokens=-1), CorruptArtifactError, "sink_tokens must be an integer from 0"),
    "choice-number": (set_header(sink_choice=1), CorruptArtifactError, "SinkChoice"),
    "choice-reason": (set_header(sink_choice={}), CorruptArtifactError, "reason"),
    "choice-texts": (
        set_header(sink_choice={"reason": "", "errors": ["a"], "bits": [1.0]}),
        CorruptArtifactError,
        "errors must be numbers",
    ),
    "choice-lengths": (
        set_header(sink_choice={"reason": "", "errors": [], "bits": [1.0]}),
        CorruptArtifactError,
        "errors and bits must have one length",
    ),
    "corpus-field": (set_corpus(n_tokens="many"), CorruptArtifactError, "n_tokens must be of type"),
    "corpus-extra": (set_corpus(path="elsewhere"), CorruptArtifactError, "path"),
}


def write_wrong(path: Path, change: Callable[[Header, Arrays], None]) -> None:
    stored = artifact()._stored()
    header, arrays = json.loads(canonical_json(stored.header)), dict(stored.arrays)
    change(header, arrays)
    write(path, Stored(format=FORMAT, header=header, arrays=arrays))


@either_format
@pytest.mark.parametrize("name", WRONG)
def test_wrong_content_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    change, error, _ = WRONG[name]
    path = tmp_path / f"q{suffix}"
    write_wrong(path, change)
    with pytest.raises(error) as caught:
        load(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


def test_quantizers_wrapped_too_deep(tmp_path: Path) -> None:
    write_wrong(tmp_path / "q.pkl", nest)
    read_or_refuse(tmp_path / "q.pkl")  # how deep is too deep is Python's business; only an ArtifactError may come


REFUSE_ALL = """
import json
import sys
from artifacts.artifact import load
from kvgauge.cli.artifact import main

for path in sys.argv[1:]:
    try:
        load(path)
    except Exception as error:
        print("refused", json.dumps([path, type(error).__name__, str(error)]))
    assert main(["validate", path]) == 1
    assert main(["inspect", path]) in (0, 1)
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, where no test has installed anything."""
    root = str(Path(artifacts.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=60)


def test_refusals_as_users_see_them(tmp_path: Path) -> None:
    """Without the shape checks of the tests, which catch wrong types before our own messages do."""
    expected: dict[str, tuple[type[ArtifactError], str]] = {}
    for name, (put, error, message) in FOREIGN.items():
        put(tmp_path / f"foreign-{name}")
        expected[str(tmp_path / f"foreign-{name}")] = error, message
    for name, (change, error, message) in WRONG.items():
        write_wrong(tmp_path / f"wrong-{name}.pkl", change)
        expected[str(tmp_path / f"wrong-{name}.pkl")] = error, message
    done = python(REFUSE_ALL, *expected)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line.removeprefix("refused")) for line in done.stdout.splitlines() if line.startswith("refused")]
    assert [path for path, _, _ in rows] == list(expected)
    for path, kind, text in rows:
        error, message = expected[path]
        assert kind == error.__name__, text
        assert text.startswith(path)
        assert message in text
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "harm").exists()


def test_looking_into_a_file_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, artifacts, artifacts.inspect, artifacts.storage, kvgauge.cli.artifact as program\n"
        f"assert program.main(['inspect', {str(save_to(tmp_path))!r}]) == 0\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'sklearn', 'scipy') if name in sys.modules])"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# ---- the format is frozen


def flat(codes: Codes) -> dict[str, Tensor]:
    inner = {} if codes.inner is None else {f"inner.{name}": tensor for name, tensor in flat(codes.inner).items()}
    return {**codes.tensors, **inner}


def nested(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Codes:
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    inside = {name.removeprefix("inner."): tensor for name, tensor in tensors.items() if "." in name}
    inner = nested(inside) if inside else None
    spans = {name: Span(entries="counts") for name in own if "counts" in own and name != "counts"}
    return Codes(tensors=own, shape=(5, CHANNELS), dtype=dtype, spans=spans, inner=inner)


def write_golden() -> None:
    """The artifact in both formats; for every site the codes of `tokens()`, and what they decode to."""
    for suffix in SUFFIXES:
        save(artifact(), GOLDEN / f"artifact{suffix}")
    found: dict[str, Tensor] = {}
    for site, quantizer in artifact().items():
        codes = quantizer.encode(tokens())
        found |= {f"{site}/codes/{name}": tensor.clone() for name, tensor in flat(codes).items()}
        found[f"{site}/decoded"] = quantizer.decode(codes).clone()
    safetensors.torch.save_file(found, GOLDEN / "decoded.safetensors")


@either_format
def test_golden_file_is_what_is_written_today(tmp_path: Path, suffix: str) -> None:
    assert save_to(tmp_path, suffix).read_bytes() == (GOLDEN / f"artifact{suffix}").read_bytes()


@either_format
def test_golden_file_decodes_to_golden_tensors(suffix: str) -> None:
    frozen = safetensors.torch.load_file(GOLDEN / "decoded.safetensors")
    found = load(GOLDEN / f"artifact{suffix}")
    assert {name.partition("/")[0] for name in frozen} == {str(site) for site in found}
    for site, quantizer in found.items():
        prefix = f"{site}/codes/"
        codes = {name.removeprefix(prefix): tensor for name, tensor in frozen.items() if name.startswith(prefix)}
        for name, tensor in flat(quantizer.encode(tokens())).items():
            assert torch.equal(tensor, codes[name]), f"{site}: {name}"
        assert torch.equal(quantizer.decode(nested(codes)), frozen[f"{site}/decoded"])


def test_golden_files_are_small() -> None:
    """Those of this artifact; `test_formats.py` knows the others."""
    assert {path.name for path in GOLDEN.iterdir()} >= ARTIFACT_FILES
    assert all((GOLDEN / name).stat().st_size < 5000 for name in ARTIFACT_FILES)


if __name__ == "__main__":
    write_golden()
