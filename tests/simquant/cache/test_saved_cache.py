"""Caches in files: the same continuation, and a named error for everything that is not the file that was written."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.caches import generate, step
from helpers.models import build
from helpers.quantizers import QUANTIZERS
from helpers.sites import everywhere
from torch import Tensor
from transformers import LlamaForCausalLM

from artifacts.errors import ArtifactError, CorruptArtifactError, MismatchError, UnsupportedVersionError
from artifacts.quantizer import Quantizer
from artifacts.sites import Site, Stage
from artifacts.storage import read, write
from simquant import CachePolicy, CacheStateError, Eviction, load_cache, packed_cache, save_cache
from simquant.cache.saving.saved_cache import FORMAT, VERSION

CHANNELS = 16
IDS = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(0))
POLICIES = {
    "all": CachePolicy(),
    "windows": CachePolicy(sink_tokens=1, residual_tokens=3, block_tokens=4),
    "small norms": CachePolicy(sink_tokens=1, residual_tokens=4, block_tokens=4, keep_smallest_norm=2),
    "exact prefill": CachePolicy(residual_tokens=4, block_tokens=4, exact_prefill=True),
}
EVICTING = CachePolicy(
    residual_tokens=2,
    eviction=Eviction(
        prefill="snapkv",
        prefill_tokens=14,
        prefill_recent_tokens=4,
        decoding="slide",
        decoding_tokens=4,
        decoding_recent_tokens=2,
    ),
)


def quantizers(name: str, stage: Stage = "pre_rope") -> dict[Site, Quantizer]:
    return everywhere(lambda: QUANTIZERS[name](CHANNELS, 3), stage)


def saved(model: LlamaForCausalLM, path: Path) -> Path:
    with packed_cache(model, quantizers("rank-affine"), policy=POLICIES["windows"]) as new:
        cache = new()
        step(model, cache, IDS)
        save_cache(cache, path)
    return path


def loaded(
    model: LlamaForCausalLM, path: Path, name: str = "rank-affine", policy: CachePolicy = POLICIES["windows"]
) -> None:
    with packed_cache(model, quantizers(name), policy=policy) as new:
        load_cache(path, new())


def goes_on(
    model: LlamaForCausalLM, own: Mapping[Site, Quantizer], policy: CachePolicy, path: Path, **options: Tensor
) -> bool:
    """With the same tokens, and with the same content at the end, as the cache that was saved."""
    with packed_cache(model, own, policy=policy) as new:
        cache = new()
        ids = generate(model, IDS, cache, max_new_tokens=5, min_new_tokens=5, **options)
        save_cache(cache, path)
        held = list(cache.tensors())
        options = {name: torch.cat([x, x.new_ones(2, 5)], dim=1) for name, x in options.items()}
        expected = generate(model, ids, cache, max_new_tokens=6, min_new_tokens=6, **options)
    with packed_cache(model, own, policy=policy) as new:
        again = load_cache(path, new())
        same = again.get_seq_length() == 34 and alike(again.tensors(), held)
        resumed = generate(model, ids, again, max_new_tokens=6, min_new_tokens=6, **options)
    return same and torch.equal(resumed, expected) and alike(again.tensors(), cache.tensors())


def alike(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(some, others, strict=True))


# --- going on


@pytest.mark.parametrize("stage", ["pre_rope", "post_rope"])
@pytest.mark.parametrize(
    "name", ["identity", "rank-affine", "dynamic-groups-of-tokens", "entropy-coded", "streaming", "rotated-dynamic"]
)
def test_a_saved_cache_goes_on_as_if_it_had_not_been(
    name: str, stage: Stage, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    assert goes_on(tiny_llama, quantizers(name, stage), POLICIES["windows"], tmp_path / "cache.safetensors")


@pytest.mark.shapes
@pytest.mark.parametrize("policy", [*POLICIES.values(), EVICTING], ids=[*POLICIES, "eviction"])
def test_it_remembers_what_its_policy_does(policy: CachePolicy, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    assert goes_on(tiny_llama, quantizers("percentile-dynamic"), policy, tmp_path / "cache.pkl")


def test_padding_is_remembered(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :11] = 0
    own = quantizers("rank-affine")
    assert goes_on(tiny_llama, own, POLICIES["windows"], tmp_path / "cache.safetensors", attention_mask=mask)


def test_blocks_stay_blocks(tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simquant.cache.store.layer_store.BLOCK_TOKENS", 8)
    path = tmp_path / "cache.safetensors"
    assert goes_on(tiny_llama, quantizers("dynamic"), POLICIES["all"], path)
    with packed_cache(tiny_llama, quantizers("dynamic"), policy=POLICIES["all"]) as new:
        cache = load_cache(path, new())
        for _, store in (pair for layer in cache.layers for pair in layer.store.stores()):
            assert [codes.shape[0] for codes in store.blocks] == [8, 8, 8, 8, 2]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in cache.layers[0].store.tensors())
    assert len(read(path, FORMAT, VERSION).arrays) <= 6, "one for each dtype and row shape"


def test_what_a_sliding_window_has_passed_stays_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simquant.cache.store.layer_store.BLOCK_TOKENS", 8)
    path = tmp_path / "cache.safetensors"
    model = build("gemma3_text")  # its first layer has one, and another rotary table than the second
    assert goes_on(model, quantizers("dynamic"), CachePolicy(sink_tokens=1), path)
    with packed_cache(model, quantizers("dynamic"), policy=CachePolicy(sink_tokens=1)) as new:
        first_tokens = [
            store.first_token for layer in load_cache(path, new()).layers for _, store in layer.store.stores()
        ]
    assert [first > 0 for first in first_tokens] == [True] * 4 + [False] * 4


@pytest.mark.shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rank-affine", "identity"])
def test_every_precision_comes_back(
    name: str, dtype: torch.dtype, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    """float64 was written, and called corrupt when it was read."""
    assert goes_on(tiny_llama.to(dtype), quantizers(name), POLICIES["small norms"], tmp_path / "cache.safetensors")


def test_an_empty_cache_can_be_saved(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with packed_cache(tiny_llama, quantizers("dynamic")) as new:
        save_cache(new(), tmp_path / "cache.safetensors")
        cache = load_cache(tmp_path / "cache.safetensors", new())
        assert torch.equal(step(tiny_llama, cache, IDS), step(tiny_llama, new(), IDS))


def test_same_cache_same_bytes(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    one, other = (saved(tiny_llama, tmp_path / f"{n}.safetensors") for n in range(2))
    assert one.read_bytes() == other.read_bytes()


# --- refusals


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_damaged_files_are_named(suffix: str, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = saved(tiny_llama, tmp_path / f"cache{suffix}")
    whole, random = path.read_bytes(), torch.Generator().manual_seed(0)
    with packed_cache(tiny_llama, quantizers("rank-affine"), policy=POLICIES["windows"]) as new:
        for where in torch.randint(len(whole), (30,), generator=random).tolist():
            flipped = bytearray(whole)
            flipped[where] ^= 1 << where % 8
            for data in (bytes(flipped), whole[:where]):
                path.write_bytes(data)
                with pytest.raises(ArtifactError, match=f"^{path}: "):
                    load_cache(path, new())
        with pytest.raises(CorruptArtifactError, match="cannot be read"):
            load_cache(tmp_path / f"none{suffix}", new())


def test_files_of_other_formats_are_named(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = saved(tiny_llama, tmp_path / "cache.safetensors")
    stored = read(path, FORMAT, VERSION)
    write(path, replace(stored, format="kvgauge.artifact"))
    with pytest.raises(CorruptArtifactError, match="expected a file of format kvgauge"):
        loaded(tiny_llama, path)


def test_caches_of_the_version_before_are_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Their words of mixed radix may be cut otherwise, and were read as other codes under the same version."""
    path = saved(tiny_llama, tmp_path / "cache.safetensors")
    write(path, replace(read(path, FORMAT, VERSION), version=1))
    message = r"cache.safetensors: kvgauge.cache of format version 1; this kvgauge reads version 2\. Install"
    with pytest.raises(UnsupportedVersionError, match=message):
        loaded(tiny_llama, path)


def test_wrong_counts_are_named(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """They ended in an error of indexing at some later step."""
    path = tmp_path / "cache.safetensors"
    with packed_cache(tiny_llama, quantizers("percentile-dynamic"), policy=POLICIES["windows"]) as new:
        cache = new()
        step(tiny_llama, cache, IDS)
        for layer in cache.layers:
            for _, store in layer.store.stores():
                store.blocks = [
                    codes.map(lambda tensor: tensor + 1 if tensor.dtype == torch.uint8 and tensor.ndim == 1 else tensor)
                    for codes in store.blocks
                ]
        save_cache(cache, path)
        with pytest.raises(CorruptArtifactError, match="entries that counts says; got"):
            load_cache(path, new())


@pytest.mark.parametrize("part", ["layers", "tables"])
def test_content_that_is_none_is_named(part: str, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """With the right digest: written by someone who knows how."""
    path = saved(tiny_llama, tmp_path / "cache.safetensors")
    stored = read(path, FORMAT, VERSION)
    with packed_cache(tiny_llama, quantizers("rank-affine"), policy=POLICIES["windows"]) as new:
        for wrong in (None, [], {}, 7, [{"n_columns": 3, "streams": [{}]}] * 2, {"tables": [["float32", 0, 9]]}):
            write(path, replace(stored, header={**stored.header, part: wrong}))
            cache = new()
            with pytest.raises(CorruptArtifactError, match=f"^{path}: expected the records of a packed cache"):
                load_cache(path, cache)
            assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("quantizers", {"name": "affine"}),
        ("policy", {"policy": replace(POLICIES["windows"], residual_tokens=4)}),
    ],
)
def test_another_use_is_named(
    what: str, changes: dict[str, object], tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = saved(tiny_llama, tmp_path / "cache.safetensors")
    with pytest.raises(MismatchError, match=f"^{path}: saved with other {what}; expected .*, got "):
        loaded(tiny_llama, path, **changes)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("model", lambda model: setattr(model.config, "vocab_size", 99)),
        ("weights", lambda model: model.model.layers[1].self_attn.k_proj.weight.data.mul_(1.01)),
        ("dtype", lambda model: model.bfloat16()),
    ],
)
def test_another_model_is_named(
    what: str, change: Callable[[LlamaForCausalLM], object], tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = saved(tiny_llama, tmp_path / "cache.safetensors")
    change(tiny_llama)
    with pytest.raises(MismatchError, match=f"^{path}: saved with other "):
        loaded(tiny_llama, path)


def test_caches_in_use_are_not_overwritten(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = saved(tiny_llama, tmp_path / "cache.safetensors")
    with packed_cache(tiny_llama, quantizers("rank-affine"), policy=POLICIES["windows"]) as new:
        cache = load_cache(path, new())
        with pytest.raises(CacheStateError, match="expected an empty cache; got one of 30 tokens"):
            load_cache(path, cache)


def test_half_a_step_is_not_saved(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with packed_cache(tiny_llama, quantizers("dynamic")) as new:
        cache = new()
        step(tiny_llama, cache, IDS)
        handle = tiny_llama.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(tiny_llama, cache, IDS[:, :1])
        handle.remove()
        with pytest.raises(CacheStateError, match="left by a step that failed"):
            save_cache(cache, tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())
