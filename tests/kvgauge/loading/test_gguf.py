"""GGUF files as models: the same logits as the folder with the same weights, and what is refused."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gguf_files import save_llama, write_gguf
from helpers.programs import prose
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from artifacts import load
from kvgauge.cli import calibrate, evaluate
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading import gguf_file, source
from kvgauge.loading.gguf_file import GgufFile
from kvgauge.loading.gguf_rope import complete_rope
from kvgauge.loading.models import LoadedModel, load_model
from kvgauge.terminal.console import UsageError

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

IDS = torch.arange(40, 80)[None]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Llama as a folder and as GGUF files, each in a folder of its own; read-only."""
    shelf = tmp_path_factory.mktemp("shelf")
    model = save_llama(shelf / "plain")
    for kind in ("F32", "Q8_0", "Q4_1"):
        (shelf / kind).mkdir()
        write_gguf(shelf / kind / f"tiny-{kind}.gguf", model, kind)
    return shelf


@pytest.fixture
def here(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shelf)
    return shelf


def loaded(name: object, **options: Any) -> LoadedModel:
    return load_model(ModelConfig(model=str(name), device="cpu", **options))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ["F32/tiny-F32.gguf", "F32"])
def test_a_file_is_the_model_of_the_folder_with_its_weights(name: str, here: Path, tmp_path: Path) -> None:
    file, folder = loaded(name), loaded("plain")
    assert torch.equal(logits(file.model), logits(folder.model))
    assert file.encode("that path, 1984") == folder.encode("that path, 1984")
    assert file.fingerprint(file.layers()) == folder.fingerprint(folder.layers())
    assert file.model_id is None
    file.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(folder.model))
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantized_weights_are_those_that_the_file_stands_for(kind: str, here: Path) -> None:
    file, plain = loaded(kind).model, LlamaForCausalLM.from_pretrained("plain")
    exact = gguf.GGMLQuantizationType[kind]
    for name, weight in plain.named_parameters():
        if weight.ndim == 2:  # each row in blocks of 32 values, so that the order of rows does not matter
            expected = gguf.dequantize(gguf.quantize(weight.detach().numpy(), exact), exact)
            assert torch.equal(file.get_parameter(name), torch.from_numpy(expected)), name
            assert not torch.equal(file.get_parameter(name), weight), name


def test_a_longer_context_is_that_of_the_stretched_folder(here: Path) -> None:
    file, folder = loaded("F32", maxseqlen=200), loaded("plain", maxseqlen=200)
    assert file.context == folder.context == 200
    assert file.model.config.rope_parameters["factor"] == 4
    assert torch.equal(logits(file.model), logits(folder.model))
    assert not torch.equal(logits(file.model), logits(loaded("F32").model))


def test_a_file_of_that_name_in_the_working_directory_is_not_taken(here: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-F32.gguf").write_bytes(b"GGUF, but another one")
    os.chdir(tmp_path)
    assert torch.equal(logits(loaded(here / "F32").model), logits(loaded(here / "plain").model))


def test_the_programs_take_a_file_and_record_no_path(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose(len(name)))
    artifact = tmp_path / "q.safetensors"
    given = ["Q8_0/tiny-Q8_0.gguf", "--quantizer-path", str(artifact)]
    assert calibrate.main([*given, "--dataset", str(tmp_path / "a.txt"), "--nsamples", "2", "--abits", "4"]) == 0
    assert load(artifact).manifest.model_id is None
    assert b"Q8_0" not in artifact.read_bytes()
    assert evaluate.main([*given, "--dataset", str(tmp_path / "b.txt"), "--limit", "1"]) == 0
    # The same weights in a folder are the same model.
    loaded("Q8_0").model.save_pretrained(tmp_path / "unpacked")
    loaded("Q8_0").tokenizer.save_pretrained(tmp_path / "unpacked")
    capsys.readouterr()
    given[0] = str(tmp_path / "unpacked")
    assert evaluate.main([*given, "--dataset", str(tmp_path / "b.txt"), "--limit", "1"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_file_on_the_hub_is_named_with_its_repository(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cached_file(repository: str, file: str, *, local_files_only: bool) -> str:
        asked.append((repository, file, local_files_only))
        return str(here / "F32" / file)

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    monkeypatch.setattr(source, "_hub_answers", lambda: False)
    found = loaded("owner/tiny:tiny-F32.gguf")
    assert asked == [("owner/tiny", "tiny-F32.gguf", True)]
    assert found.model_id == "owner/tiny:tiny-F32.gguf"
    assert torch.equal(logits(found.model), logits(loaded("plain").model))


# --- what is refused


def test_what_the_hub_and_its_cache_do_not_have_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate.main(["owner/nothing:tiny.gguf", "--list-sites"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("calibrate: owner/nothing:tiny.gguf: ")


def test_a_folder_with_weights_of_its_own_is_read_as_before(here: Path, tmp_path: Path) -> None:
    shutil.copytree("plain", tmp_path / "both")
    (tmp_path / "both" / "other.gguf").write_bytes(b"never opened")
    assert torch.equal(logits(loaded(tmp_path / "both").model), logits(loaded("plain").model))


def test_several_files_are_all_named(here: Path, tmp_path: Path) -> None:
    for kind in ("Q8_0", "Q4_1"):
        shutil.copy(next(Path(kind).iterdir()), tmp_path)
    with pytest.raises(OSError, match=r"holds 2 GGUF files; pass one of them: .*/tiny-Q4_1.gguf, .*/tiny-Q8_0.gguf$"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "clip"}, r"a vision tower \(mmproj\), which has no language model"),
        (
            {"architecture": "rwkv7"},
            r"cannot read .* architecture 'rwkv7'; it reads .*gemma3, .*llama, ",
        ),
        ({"tokenizer": False}, r"has no tokenizer \(tokenizer.ggml.tokens\)"),
        (
            {"tensors": {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}},
            r"RoPE is scaled \(rope_freqs.weight\)",
        ),
        (
            {"keys": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
            r"RoPE is scaled \(yarn scaling by 4\), which transformers does not read from",
        ),
        (
            {"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}},
            r"1 of its tensors have no place in LlamaForCausalLM, such as blk.0.attn_q.bias",
        ),
    ],
)
def test_what_would_be_another_model_is_refused(
    options: dict[str, Any], message: str, here: Path, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "odd.gguf", LlamaForCausalLM.from_pretrained("plain"), **options)
    with pytest.raises(OSError, match=message):
        loaded(tmp_path / "odd.gguf")


def llama3_divisors(theta: float, factor: float, n_channels: int) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1 and later (`rope_freqs`), by its three cases."""
    low, high, context = 1, 4, 8192
    divisors = []
    for channel in range(0, n_channels, 2):
        wavelength = 2 * math.pi * theta ** (channel / n_channels)
        smooth = (context / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1 if wavelength < context / high else factor if wavelength > context / low else between)
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_scaling_that_transformers_leaves_out_is_taken_from_the_file(name: str, tmp_path: Path) -> None:
    theta = 500_000.0
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling = {"rope_type": name, "factor": 8.0, "rope_theta": theta, **(bands if name == "llama3" else {})}
    model = save_llama(tmp_path / "plain", rope_parameters=scaling)
    divisors = llama3_divisors(theta, 8.0, 8)
    assert len({*divisors.tolist()}) > 2  # all three cases
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}
    write_gguf(
        tmp_path / "scaled.gguf",
        model,
        keys=linear if name == "linear" else {},
        tensors={"rope_freqs.weight": divisors} if name == "llama3" else {},
    )
    file, folder = loaded(tmp_path / "scaled.gguf"), loaded(tmp_path / "plain")
    assert torch.equal(logits(file.model), logits(folder.model))
    assert file.fingerprint(file.layers()) == folder.fingerprint(folder.layers())
    write_gguf(tmp_path / "unscaled.gguf", model)
    assert not torch.equal(logits(loaded(tmp_path / "unscaled.gguf").model), logits(folder.model))


def test_layers_that_see_a_window_keep_their_frequencies() -> None:
    config = Gemma3TextConfig()
    keys = {"general.architecture": "gemma3", "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    complete_rope(config, GgufFile(Path("gemma.gguf"), keys, ()))
    ropes = config.rope_parameters
    assert (ropes["full_attention"]["rope_type"], ropes["full_attention"]["factor"]) == ("linear", 8)
    assert ropes["sliding_attention"]["rope_type"] == "default"


def test_scaling_by_one_is_none(here: Path, tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}
    write_gguf(tmp_path / "same.gguf", LlamaForCausalLM.from_pretrained("plain"), keys=keys)
    assert torch.equal(logits(loaded(tmp_path / "same.gguf").model), logits(loaded("plain").model))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_file_is_refused_wherever_it_is_cut(share: float, here: Path, tmp_path: Path) -> None:
    whole = Path("Q8_0/tiny-Q8_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(OSError, match=r"cut\.gguf: .*download it again"):
        loaded(tmp_path / "cut.gguf")


def test_other_files_are_refused_by_their_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(OSError, match=r"page.gguf: no GGUF file: it begins with b'<!DO', expected b'GGUF'"):
        loaded(tmp_path / "page.gguf")
    with pytest.raises(OSError, match=r"gone.gguf: no such file or folder"):
        loaded("gone.gguf")


def test_a_part_of_a_split_file_is_told_how_to_be_joined(tmp_path: Path) -> None:
    (tmp_path / "big-Q8_0-00002-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(OSError, match=r"part 2 of 3 of a split .* --merge FIRST_PART big-Q8_0.gguf, and pass big-Q8_0"):
        loaded(tmp_path)


def test_missing_packages_are_named_with_what_installs_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"GGUF files need gguf and accelerate: pip install 'kvgauge\[gguf\]'$"):
        GgufFile.read(Path("F32/tiny-F32.gguf"))
