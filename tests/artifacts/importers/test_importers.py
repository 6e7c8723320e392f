"""Files of KVQuant, LLaMA3-simquant and msModelSlim open, say what they lack, and can run nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.foreign_files import (
    CHANNELS,
    LAYERS,
    kvquant_content,
    kvquant_levels,
    simquant_content,
    write_msmodelslim,
    write_pickle,
)
from safetensors.torch import load_file, save_file

from artifacts import load, save
from artifacts.artifact import Artifact
from artifacts.errors import ArtifactError, CorruptArtifactError, MismatchError
from artifacts.importers import Hints, open_foreign
from artifacts.importers.tables import normal_float
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.sparse import PercentileSparse, ThresholdSparse
from artifacts.sites import Site
from calib.calibration import add_windows, new_statistics
from calib.estimators.ranges import channel_ranges
from calib.fitting.fit import fit
from calib.recipe.recipe import load_recipe

pytestmark = pytest.mark.shapes

KEY, VALUE = Site(0, "key", "pre_rope"), Site(0, "value")
LEVELS = kvquant_levels(3)


def opened(path: Path, **hints: object) -> Artifact:
    return open_foreign(path, Hints(**hints)).artifact


def vectors(seed: int = 0, n_tokens: int = 32) -> torch.Tensor:
    return torch.randn(n_tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))


# --- KVQuant


@pytest.mark.parametrize("name", ["q.pkl", "quantizers.pickle", "quantizers", "q.safetensors"])
def test_kvquant_opens_under_any_name(tmp_path: Path, name: str) -> None:
    artifact = opened(write_pickle(tmp_path / name, kvquant_content((LEVELS,))))
    assert len(artifact) == 2 * LAYERS
    assert isinstance(artifact[KEY], Codebook)
    assert isinstance(artifact[VALUE], DynamicCodebook)
    assert artifact[KEY].channels == artifact[VALUE].channels == CHANNELS


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_kvquant_of_older_pythons_is_the_same(tmp_path: Path, protocol: int) -> None:
    old, new = (write_pickle(tmp_path / f"{p}.pkl", kvquant_content((LEVELS,)), p) for p in (protocol, 5))
    assert opened(old).digest == opened(new).digest


def test_kvquant_levels_are_sorted_and_in_float16(tmp_path: Path) -> None:
    key = opened(write_pickle(tmp_path / "q.pkl", kvquant_content((LEVELS,))))[KEY]
    assert torch.equal(key.levels[0], torch.from_numpy(np.sort(LEVELS[0].ravel())).half())


@pytest.mark.parametrize("nuq", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_kvquant_file_of_our_own_fit_gives_the_same_vectors(
    tmp_path: Path, tiny_llama: torch.nn.Module, nuq: bool, sparse: bool
) -> None:
    windows = torch.randint(0, tiny_llama.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    method = {"method": "codebook", "bits": 3} if nuq else {"method": "uniform", "bits": 3}
    outliers = {"outliers": {"fraction": 0.02}} if sparse else {}
    entries = {"key": {**method, "per": "channel", "threshold_dtype": "float16", **outliers}}
    entries["value"] = {**method, "per": "token", **outliers}
    statistics = new_statistics(tiny_llama, (layers := _layers(tiny_llama)))
    add_windows(tiny_llama, layers, statistics, windows)
    fitted = fit(statistics, load_recipe("kvquant").edited(entries))
    content = {_name(site): _official(statistics, site, quantizer, sparse, nuq) for site, quantizer in fitted.items()}
    hints = Hints(bits=3, outlier_fraction=0.02 if sparse else None)
    imported = open_foreign(write_pickle(tmp_path / "q.pkl", content), hints).artifact
    for site, quantizer in fitted.items():
        x = 3 * torch.randn(20, quantizer.channels, generator=torch.Generator().manual_seed(1))
        assert torch.equal(imported[site].simulate(x), quantizer.simulate(x)), site


def _layers(model: torch.nn.Module) -> tuple:
    from artifacts.model.attention import attention_layers

    return attention_layers(model)


def _name(site: Site) -> str:
    return f"model.layers.{site.layer}.self_attn.{site.tensor[0]}_proj"


def _official(statistics: object, site: Site, quantizer: object, sparse: bool, nuq: bool) -> tuple:
    """The tuple that KVQuant would have written for the same thresholds and levels."""
    if site.tensor == "key":
        ranges = channel_ranges(statistics.site(site, 0), 0.02 if sparse else 0.0)
        upper, lower = ranges.high[None], ranges.low[None]
    else:
        upper, lower = torch.ones(96, 1), -torch.ones(96, 1)
    inner = quantizer.inner if sparse else quantizer
    shuffled = inner.levels[0].flip(0).float().numpy()[:, None] if nuq else None
    return (upper, lower, [shuffled]) if nuq else (upper, lower)


def test_kvquant_ranges_need_bits_and_become_uniform_grids(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "q.pkl", kvquant_content())
    with pytest.raises(MismatchError, match=r"does not contain the code width\. Add --abits N"):
        open_foreign(path)
    artifact = opened(path, bits=4)
    assert isinstance(artifact[KEY], Affine)
    assert isinstance(artifact[VALUE], DynamicAffine)
    key = artifact[KEY]
    x = torch.minimum(torch.maximum(vectors(), key.offset), key.offset + 15 * key.scale)
    assert ((key.simulate(x) - x).abs() <= key.scale / 2 + 1e-5).all()


def test_kvquant_ranges_with_nf_are_normal_float(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "q.pkl", kvquant_content())
    key = opened(path, bits=4, normal_float=True)[KEY]
    assert torch.equal(key.levels[0], normal_float(4).half())


def test_normal_float_levels_are_those_of_kvquant() -> None:
    published = {
        2: [-1, 0, 0.337915, 1],
        3: [-1, -0.478629, -0.217142, 0, 0.16093, 0.337915, 0.562617, 1],
    }
    for bits, levels in published.items():
        assert normal_float(bits).tolist() == pytest.approx(levels, abs=1e-6)


def test_kvquant_outliers_are_beyond_the_thresholds(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "q.pkl", kvquant_content((LEVELS,)))
    artifact = opened(path, outlier_fraction=0.1)
    key, value = artifact[KEY], artifact[VALUE]
    assert isinstance(key, ThresholdSparse)
    assert isinstance(value, PercentileSparse)
    x = vectors().half().float()
    beyond = (x < key.lower) | (x > key.upper)
    assert beyond.any()
    assert torch.equal(key.simulate(x)[beyond], x[beyond])


def test_q_norm_chooses_by_the_old_levels_and_decodes_to_the_new(tmp_path: Path) -> None:
    gain, shift = 1.1, 0.05
    plain = opened(write_pickle(tmp_path / "p.pkl", kvquant_content((LEVELS,))))
    normed_content = kvquant_content((LEVELS, torch.tensor(gain), torch.tensor(shift)))
    normed = opened(write_pickle(tmp_path / "n.pkl", normed_content))
    x = vectors()
    for site in (KEY, VALUE):
        assert torch.equal(plain[site].encode(x).tensors["codes"], normed[site].encode(x).tensors["codes"])
    key = normed[KEY]
    expected = key.offset + key.scale * ((plain[KEY].simulate(x) - key.offset) / key.scale * gain + shift)
    assert torch.allclose(key.simulate(x), expected, atol=2e-3)
    save(normed, tmp_path / "n.safetensors")
    assert load(tmp_path / "n.safetensors").digest == normed.digest


def test_longer_tuples_and_old_entries_are_left_out_and_named(tmp_path: Path) -> None:
    content = {**kvquant_content((LEVELS, -1, 0.1, "x")), "model.layers.0.self_attn.k_proj.lut": 5}
    found = open_foreign(write_pickle(tmp_path / "q.pkl", content))
    plain = open_foreign(write_pickle(tmp_path / "p.pkl", kvquant_content((LEVELS,))))
    assert found.artifact.digest == plain.artifact.digest
    assert any("unknown entries at the end" in notice for notice in found.notices)
    assert any("1 old entries" in notice for notice in found.notices)


def test_flat_thresholds_and_dbrx_names(tmp_path: Path) -> None:
    flat = {
        name: tuple(part.reshape(-1) if isinstance(part, torch.Tensor) else part for part in entry)
        for name, entry in kvquant_content((LEVELS,), "transformer.blocks.{}.{}_proj").items()
    }
    plain = opened(write_pickle(tmp_path / "p.pkl", kvquant_content((LEVELS,))))
    assert opened(write_pickle(tmp_path / "q.pkl", flat)).digest == plain.digest


def test_a_constant_channel_comes_back_as_it_is(tmp_path: Path) -> None:
    content = kvquant_content((LEVELS,))
    for upper, lower, *_ in content.values():
        if upper.shape[0] == 1:
            upper[0, 3] = lower[0, 3] = 0.75
    key = opened(write_pickle(tmp_path / "q.pkl", content))[KEY]
    x = vectors()
    x[:, 3] = 0.75
    assert (key.simulate(x)[:, 3] == 0.75).all()


def test_every_assumption_about_a_kvquant_file_is_named(tmp_path: Path) -> None:
    notices = "\n".join(open_foreign(write_pickle(tmp_path / "q.pkl", kvquant_content()), Hints(bits=4)).notices)
    for words in ("thresholds of calibration tokens", "outliers", "sink tokens", "uniform grids", "a file of KVQuant"):
        assert words in notices
    said = Hints(outlier_fraction=0.01, sink_tokens=1)
    fewer = "\n".join(open_foreign(write_pickle(tmp_path / "n.pkl", kvquant_content((LEVELS,))), said).notices)
    for words in ("assumed none", "uniform grids"):
        assert words not in fewer


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"bits": 4}, r"--abits 4 was given, but the file has 8 levels, which are 3 bits"),
        ({"codebooks": False}, "Drop --no-nuq"),
    ],
)
def test_hints_that_contradict_the_file_are_refused(tmp_path: Path, hints: dict, message: str) -> None:
    path = write_pickle(tmp_path / "q.pkl", kvquant_content((LEVELS,)))
    with pytest.raises(MismatchError, match=message):
        opened(path, **hints)


def test_asking_for_codebooks_where_there_are_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="Drop --nuq"):
        opened(write_pickle(tmp_path / "q.pkl", kvquant_content()), bits=4, codebooks=True)


# --- LLaMA3-simquant


@pytest.mark.parametrize("as_list", [False, True])
def test_simquant_levels_are_in_units_of_the_activations(tmp_path: Path, as_list: bool) -> None:
    # Broke in the tool itself: levels fitted to raw values were laid over a range of [-1, 1].
    levels = torch.linspace(-5, 5, 8)
    content = simquant_content([levels.numpy()] if as_list else levels, (None, None) if as_list else ())
    artifact = opened(write_pickle(tmp_path / "q.pkl", content))
    x = 2 * vectors()
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    for site in (KEY, VALUE):
        assert torch.allclose(artifact[site].simulate(x), nearest, atol=5e-3)


def test_simquant_without_levels_needs_bits(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "q.pkl", simquant_content(None))
    with pytest.raises(MismatchError, match="Add --abits N"):
        open_foreign(path)
    artifact = opened(path, bits=8)
    assert isinstance(artifact[KEY], Affine)
    assert isinstance(artifact[VALUE], DynamicAffine)


def test_simquant_without_activations_is_refused(tmp_path: Path) -> None:
    content = simquant_content(None) | {"model.layers.0.self_attn.v_proj": (None, None, None)}
    with pytest.raises(CorruptArtifactError, match=r"layers\.0\.value: expected thresholds; got None"):
        opened(write_pickle(tmp_path / "q.pkl", content), bits=4)


# --- msModelSlim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("label", ["C8", "W8A16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_msmodelslim_reads_as_its_engine_does(tmp_path: Path, dtype: torch.dtype, label: str, shards: int) -> None:
    folder = write_msmodelslim(tmp_path / "m", dtype, label=label, shards=shards)
    artifact = opened(folder)
    tensors = {name: t.float() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert set(artifact) == {s for n in range(LAYERS) for s in (Site(n, "key", "post_rope"), Site(n, "value"))}
    x = vectors()
    for site, tensor in ((Site(0, "key", "post_rope"), "k"), (VALUE, "v")):
        scale, offset = (
            tensors[f"model.layers.0.self_attn.{tensor}_proj.kv_cache_{part}"] for part in ("scale", "offset")
        )
        expected = ((x / scale + offset).round().clamp(-128, 127) - offset) * scale
        assert torch.allclose(artifact[site].simulate(x), expected, atol=1e-5)


def test_msmodelslim_names_what_it_assumes(tmp_path: Path) -> None:
    folder = write_msmodelslim(tmp_path / "m", label="W8A16")
    tensors = load_file(folder / "quant_model_weights.safetensors")
    save_file({n: t for n, t in tensors.items() if "offset" not in n}, folder / "quant_model_weights.safetensors")
    (folder / "quant_model_description.json").unlink()
    notices = "\n".join(open_foreign(folder).notices)
    for words in (
        "no offset: assumed 0",
        "quant_model_description.json is missing",
        "after RoPE",
        "record of its model",
    ):
        assert words in notices
    labelled = "\n".join(open_foreign(write_msmodelslim(tmp_path / "n", label="W8A16")).notices)
    assert "labelled W8A16" in labelled


def test_zero_scales_are_reported_by_name_and_count(tmp_path: Path) -> None:
    folder = write_msmodelslim(tmp_path / "m")
    file = folder / "quant_model_weights.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.kv_cache_scale"][:5] = 0
    save_file(tensors, file)
    with pytest.raises(CorruptArtifactError, match=r"1 of 4 tensors .*layers\.1\.self_attn\.v_proj\S+ \(5 of 16\)"):
        open_foreign(folder)


def _drop_shard(folder: Path) -> None:
    next(folder.glob("*-00002-*")).unlink()


def _drop_tensor(folder: Path) -> None:
    file = next(folder.glob("*-00002-*"))
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if "kv_cache" not in name}, file)


def _four_bits(folder: Path) -> None:
    file = folder / "quant_model_description.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "kv_cache_type": "C4"}))


def _only_npy(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    np.save(folder / "kv_cache_scale.npy", {"a": np.ones(2)}, allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_shard, "00002-of-00003.safetensors, which does not exist"),
        (_drop_tensor, r"description\.json lists; \d+ are in no file, first .*kv_cache_\w+"),
        (_four_bits, r"type C8 \(8 bits\); got 'C4'"),
        (_only_npy, "the .npy variant is a pickle"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_msmodelslim(tmp_path / "m", shards=3)
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        open_foreign(folder)


def _renamed(folder: Path, old: str, new: str, keep: bool) -> Path:
    """The folder with tensors, or copies twice as large, under other names."""
    file = folder / "quant_model_weights.safetensors"
    tensors = load_file(file)
    others = {name.replace(old, new): 2 * tensor for name, tensor in tensors.items() if old in name}
    save_file({**{n: t for n, t in tensors.items() if keep or old not in n}, **others}, file)
    (folder / "quant_model_description.json").unlink()
    return folder


@pytest.mark.parametrize("other", ["model.vision_tower.encoder.layers", "visual.blocks", "audio_tower.layers"])
def test_a_tower_for_pictures_does_not_take_the_place_of_the_text_decoder(tmp_path: Path, other: str) -> None:
    """Its layers have the same numbers, and the last file that was read won."""
    plain = open_foreign(write_msmodelslim(tmp_path / "plain")).artifact
    folder = _renamed(write_msmodelslim(tmp_path / "m"), "model.layers", other, keep=True)
    found = open_foreign(folder)
    assert found.artifact.digest == plain.digest
    assert any(
        f"4 entries such as {other}.0.self_attn" in notice and "model.layers.N is assumed to be the text" in notice
        for notice in found.notices
    )


@pytest.mark.parametrize("other", ["model.decoder.layers", "model.layers.0.cross_attn.layers"])
def test_two_stacks_that_could_be_the_text_decoder_are_refused_by_name(tmp_path: Path, other: str) -> None:
    folder = _renamed(write_msmodelslim(tmp_path / "m"), "model.layers", other, keep=True)
    with pytest.raises(
        CorruptArtifactError, match=rf"{other}\.0\S+ and model\.layers\.0\S+|model\.layers.* and {other}"
    ):
        open_foreign(folder)


def test_two_names_for_one_site_are_refused_by_name(tmp_path: Path) -> None:
    folder = _renamed(write_msmodelslim(tmp_path / "m"), "self_attn", "cross_attn", keep=True)
    with pytest.raises(CorruptArtifactError, match=r"expected one name for it; got \S+cross_attn\S+ and \S+self_attn"):
        open_foreign(folder)


def test_a_fused_projection_is_not_taken_for_the_values(tmp_path: Path) -> None:
    """`qkv_proj` ends in `v_proj`."""
    folder = _renamed(write_msmodelslim(tmp_path / "m"), "v_proj", "qkv_proj", keep=False)
    with pytest.raises(CorruptArtifactError, match=r"expected names such as .*; got \S+qkv_proj"):
        open_foreign(folder)


def test_kvquant_names_are_chosen_alike(tmp_path: Path) -> None:
    content = kvquant_content((LEVELS,))
    plain = opened(write_pickle(tmp_path / "p.pkl", content))
    vision = kvquant_content((LEVELS,), "vision_tower.layers.{}.self_attn.{}_proj")
    found = open_foreign(write_pickle(tmp_path / "q.pkl", {**content, **vision}))
    assert found.artifact.digest == plain.digest
    assert any("vision_tower.layers" in notice for notice in found.notices)
    twice = {**content, **kvquant_content((LEVELS,), "model.layers.{}.other_attn.{}_proj")}
    with pytest.raises(CorruptArtifactError, match=r"expected one name for it; got \S+self_attn\S+ and \S+other_attn"):
        opened(write_pickle(tmp_path / "r.pkl", twice))


# --- safety


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def _nested(payload: object) -> bytes:
    """A call of torch's loader for storages on bytes that are themselves a pickle."""
    return pickle.dumps(
        {"model.layers.0.self_attn.k_proj": Call(torch.storage._load_from_bytes, pickle.dumps(payload))}
    )


def hostile(sentinel: Path) -> dict[str, bytes]:
    touch = f"touch {sentinel}"
    name = "model.layers.0.self_attn.k_proj"
    return {
        "system": pickle.dumps({name: Call(os.system, touch)}),
        "eval": pickle.dumps({name: Call(eval, f"open({str(sentinel)!r}, 'w')")}),
        "old protocol": pickle.dumps({name: Call(os.system, touch)}, protocol=2),
        "torch load": _nested(Call(os.system, touch)),
        "numpy load": pickle.dumps({name: Call(np.load, "x.npy")}),
        "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02U\x01aQ.",
        "memo": b"\x80\x04K\x01r\xff\xff\xff\x7f.",
        "object array": pickle.dumps({name: np.array([Call(os.system, touch)], dtype=object)}),
        "shape": b"\x80\x04\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93(B\x04\x00\x00\x00abcd"
        b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f4\x85R\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x10\x85\x8c\x01CtR.",
        "deep": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
        "self": b"\x80\x04}\x94\x8c\x01ah\x00s.",
        "trailing": pickle.dumps(kvquant_content((LEVELS,))) + b"x",
    }


@pytest.mark.parametrize("name", sorted(hostile(Path("x"))))
def test_nothing_in_a_file_is_run(tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "sentinel"
    path = tmp_path / "q.pkl"
    path.write_bytes(hostile(sentinel)[name])
    with pytest.raises(ArtifactError, match=r"q\.pkl: "):
        open_foreign(path, Hints(bits=4))
    assert not sentinel.exists()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, cut off, doubled or moved."""
    broken = bytearray(data)
    at = int(rng.integers(1, len(data)))
    match int(rng.integers(5)):
        case 0:
            del broken[at:]
        case 1:
            broken[at:at] = broken[: int(rng.integers(1, 50))]
        case 2:
            del broken[at : at + int(rng.integers(1, 50))]
        case _:
            for place in rng.integers(1, len(data), int(rng.integers(1, 6))):
                broken[place] ^= 1 << int(rng.integers(8))
    return bytes(broken)


def survives(path: Path) -> None:
    """A named error, or a whole artifact with finite output."""
    try:
        artifact = open_foreign(path, Hints(bits=None)).artifact
    except ArtifactError:
        return
    for quantizer in artifact.values():
        assert torch.isfinite(quantizer.simulate(torch.zeros(1, quantizer.channels))).all()


@pytest.mark.parametrize(
    "content", [kvquant_content((LEVELS,)), simquant_content(torch.linspace(-2, 2, 8))], ids=["kvquant", "simquant"]
)
def test_five_hundred_damaged_pickles(tmp_path: Path, content: dict) -> None:
    data, path, rng = pickle.dumps(content, protocol=5), tmp_path / "q.pkl", np.random.default_rng(0)
    for _ in range(500):
        path.write_bytes(damaged(data, rng))
        survives(path)


def test_five_hundred_damaged_folders(tmp_path: Path) -> None:
    folder, rng = write_msmodelslim(tmp_path / "m", shards=2), np.random.default_rng(0)
    files = sorted(folder.iterdir())
    whole = {file: file.read_bytes() for file in files}
    for _ in range(500):
        victim = files[int(rng.integers(len(files)))]
        victim.write_bytes(damaged(whole[victim], rng))
        survives(folder)
        victim.write_bytes(whole[victim])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected quantizers by module name; got list"),
        ({}, "expected quantizers by module name; got dict"),
        ({"a": 1}, "expected names such as model.layers.0.self_attn.k_proj; got 'a'"),
        ({"model.layers.0.self_attn.k_proj": 5}, r"layers\.0\.key\.pre_rope: expected \(upper, lower"),
        ({"model.layers.0.self_attn.k_proj.lut": 5}, "expected quantizers of k_proj and v_proj; got none"),
        (kvquant_content(([np.zeros((5, 1), np.float32)],)), "expected 2, 4, 8, ... 256 levels; got 5"),
        (
            kvquant_content(([np.full((4, 1), np.nan, np.float32)],)),
            "finite numbers; got 4, 4 of them not finite",
        ),
        (kvquant_content(([np.full((4, 1), 1e6, np.float32)],)), "does not fit float16"),
        (
            {name: (entry[1], entry[0], LEVELS) for name, entry in kvquant_content().items()},
            "16 of them exchanged",
        ),
        (
            {name: entry for name, entry in kvquant_content((LEVELS,)).items() if "v_proj" in name},
            "to know the number of channels; got none",
        ),
    ],
)
def test_what_is_no_quantizer_file_is_told(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        open_foreign(write_pickle(tmp_path / "q.pkl", content))


def test_own_files_come_without_notices(tmp_path: Path) -> None:
    imported = opened(write_pickle(tmp_path / "q.pkl", kvquant_content((LEVELS,))))
    for name in ("own.safetensors", "own.pkl"):
        save(imported, tmp_path / name)
        found = open_foreign(tmp_path / name)
        assert found.artifact.digest == imported.digest
        assert found.notices == ()
