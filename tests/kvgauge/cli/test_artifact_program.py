"""The program `artifact`, called as a user calls it: what it prints, where, and its exit status."""

import json
from pathlib import Path

import pytest
import torch

from artifacts.artifact import Artifact, load, save
from artifacts.sites import Site
from kvgauge.cli.artifact import main

GOLDEN = Path(__file__).parents[2] / "golden"
SAFETENSORS, PICKLE = GOLDEN / "artifact.safetensors", GOLDEN / "artifact.pkl"
KEY = Site(1, "key", "pre_rope")

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *words: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys: Capture, status: int, *words: object) -> str:
    """The one message of a command that fails; nothing on standard output, no traceback."""
    found, out, err = run(capsys, *words)
    assert (found, out) == (status, "")
    assert err.startswith("artifact: ")
    assert "Traceback" not in err
    return err


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "damaged.safetensors"
    data = bytearray(SAFETENSORS.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The golden artifact with one scale doubled."""
    golden = load(SAFETENSORS)
    doubled = golden[KEY].replace(scale=2 * golden[KEY].tensors()["scale"])
    save(Artifact({**golden, KEY: doubled}, golden.manifest, golden.ngrams), tmp_path / "other_one.pkl")
    return tmp_path / "other_one.pkl"


@pytest.mark.parametrize("path", [SAFETENSORS, PICKLE], ids=lambda path: path.suffix)
def test_inspect_prints_a_table(capsys: Capture, path: Path) -> None:
    status, out, err = run(capsys, "inspect", path)
    golden = load(path)
    assert (status, err) == (0, "")
    for site, quantizer in golden.items():
        (row,) = [line for line in out.splitlines() if line.startswith(f"{site} ")]
        assert quantizer.spec.describe() in row
        assert row.split()[1:3] == [f"{quantizer.spec.bits:.3g}", str(quantizer.static_bytes)]
    assert golden.digest[:16] in out
    assert f"static     {sum(quantizer.static_bytes for quantizer in golden.values()):,} bytes, stored once" in out
    assert "demo (llama, 3 layers)" in out
    assert "4 windows of 16 tokens, seed 0" in out
    assert "levels: -1.000 -0.500 +0.250 +1.000" in out


def test_inspect_json_is_one_object(capsys: Capture) -> None:
    status, out, err = run(capsys, "inspect", SAFETENSORS, "--json")
    found = json.loads(out)
    golden = load(SAFETENSORS)
    assert (status, err) == (0, "")
    assert found["digest"] == golden.digest
    assert found["model"] == dict(golden.manifest.model)
    assert list(found["sites"]) == [str(site) for site in golden]
    assert found["static_bytes"] == sum(quantizer.static_bytes for quantizer in golden.values())
    assert run(capsys, "inspect", PICKLE, "--json")[1] == out


def test_inspect_tells_the_range_that_comes_back(capsys: Capture) -> None:
    found = json.loads(run(capsys, "inspect", SAFETENSORS, "--json")[1])["sites"]
    far = torch.full((2, 8), 1e4) * torch.tensor([[1.0], [-1.0]])
    for site, quantizer in load(SAFETENSORS).items():
        static = getattr(quantizer, "inner", quantizer)
        if static.spec.kind in ("affine", "codebook"):
            back = static.simulate(far)
            assert found[str(site)]["range"] == pytest.approx([float(back.min()), float(back.max())])
        else:
            assert found[str(site)]["range"] is None


def test_validate(capsys: Capture) -> None:
    status, out, err = run(capsys, "validate", SAFETENSORS)
    assert (status, err) == (0, "")
    assert out == f"{SAFETENSORS}: valid, 6 sites, digest {load(SAFETENSORS).digest[:16]}\n"


@pytest.mark.parametrize("command", [("validate",), ("inspect",), ("inspect", "--json"), ("diff", PICKLE)])
def test_damaged_files_are_refused(capsys: Capture, damaged: Path, command: tuple[object, ...]) -> None:
    assert refused(capsys, 1, *command, damaged) == (
        f"artifact: {damaged}: the content does not match its digest; the file was altered or damaged. Copy it again\n"
    )


@pytest.mark.parametrize("command", [("validate",), ("inspect",), ("diff", PICKLE)])
def test_missing_files_are_refused(capsys: Capture, tmp_path: Path, command: tuple[object, ...]) -> None:
    assert "No such file" in refused(capsys, 1, *command, tmp_path / "none.pkl")


def test_debug_shows_the_traceback(capsys: Capture, damaged: Path) -> None:
    for words in (["--debug", "validate", damaged], ["validate", damaged, "--debug"]):
        status, _, err = run(capsys, *words)
        assert status == 1
        assert err.startswith("Traceback")
        assert err.splitlines()[-1].startswith(f"artifact: {damaged}")


def test_diff_of_the_same_content(capsys: Capture) -> None:
    assert run(capsys, "diff", SAFETENSORS, PICKLE) == (0, "same content\n", "")


def test_diff_lists_differences(capsys: Capture, other: Path) -> None:
    status, out, err = run(capsys, "diff", SAFETENSORS, other)
    assert (status, err) == (1, "")
    gap = float(load(SAFETENSORS)[KEY].tensors()["scale"].max())
    assert out == f"{KEY}/scale: 8 of 8 values differ, by at most {gap:.4g}\n"


def test_diff_tells_null_from_nothing(capsys: Capture, tmp_path: Path) -> None:
    golden = load(SAFETENSORS)
    for name, recipe in (
        ("a", {"name": "x", "outliers": None}),
        ("b", {"name": "x"}),
        ("c", {"name": "x", "outliers": 1}),
    ):
        object.__setattr__(golden.manifest, "recipe", recipe)
        save(golden, tmp_path / f"{name}.pkl")
    assert run(capsys, "diff", tmp_path / "a.pkl", tmp_path / "b.pkl")[:2] == (1, "recipe.outliers: null and nothing\n")
    assert run(capsys, "diff", tmp_path / "b.pkl", tmp_path / "c.pkl")[:2] == (1, "recipe.outliers: nothing and 1\n")


def test_convert_there_and_back(capsys: Capture, tmp_path: Path) -> None:
    there, back = tmp_path / "my_file.pkl", tmp_path / "back.safetensors"
    assert run(capsys, "convert", SAFETENSORS, there) == (0, f"{there}: written\n", "")
    assert run(capsys, "convert", there, back) == (0, f"{back}: written\n", "")
    assert there.read_bytes() == PICKLE.read_bytes()
    assert back.read_bytes() == SAFETENSORS.read_bytes()


def test_convert_replaces_only_when_forced(capsys: Capture, other: Path) -> None:
    before = other.read_bytes()
    assert (
        refused(capsys, 2, "convert", SAFETENSORS, other)
        == f"artifact: {other} exists; replace it with --force, or choose another name\n"
    )
    assert other.read_bytes() == before
    assert run(capsys, "convert", SAFETENSORS, other, "--force")[0] == 0
    assert other.read_bytes() == PICKLE.read_bytes()


def test_convert_refuses_what_it_cannot_read_or_write(capsys: Capture, damaged: Path, tmp_path: Path) -> None:
    assert "does not match its digest" in refused(capsys, 1, "convert", damaged, tmp_path / "q.pkl")
    assert "got '.npz'" in refused(capsys, 1, "convert", SAFETENSORS, tmp_path / "q.npz")
    assert [path.name for path in tmp_path.iterdir()] == [damaged.name]


def test_underscores_are_dashes_in_options_alone(capsys: Capture, tmp_path: Path, other: Path) -> None:
    assert run(capsys, "inspect", other)[0] == 0  # a file name keeps its underscores
    missing = tmp_path / "no_model"
    assert "no_model" in refused(capsys, 1, "validate", other, f"--model={missing}")


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["inspect"], ["inspect", "a", "--nothing"], ["diff", "a"]])
def test_wrong_usage_is_status_2(capsys: Capture, words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "See artifact" in capsys.readouterr().err
