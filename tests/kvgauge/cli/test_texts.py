"""Texts without a hub, as a user names them: the model's own, conversations, bare token ids."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.programs import prose, save_model, save_tokenizer

from artifacts import load
from kvgauge.cli import calibrate, evaluate
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import load_model

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token }}{% endfor %}"

SMALL = ["--nuq", "--abits", "4", "--seqlen", "32"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that reads bytes, the last of which ends a text."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", eos_token_id=255)
    save_tokenizer(tmp_path / "model", eos_token="ÿ")
    return tmp_path


@pytest.fixture
def ran(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Types a command; returns what it printed when it succeeded, and else what it complained of."""

    def type_in(*words: str) -> str:
        program = {"calibrate": calibrate, "evaluate": evaluate}[words[0]]
        status = program.main(["model" if word == "MODEL" else word for word in words[1:]])
        captured = capsys.readouterr()
        return captured.err.strip().splitlines()[-1] if status else captured.out + captured.err

    return type_in


def test_a_model_is_calibrated_and_evaluated_on_its_own_text(ran: Callable[..., str]) -> None:
    own = ("calibrate", "MODEL", *SMALL, "--dataset", "self", "--nsamples", "3", "--seed", "7", "--quantizer-path")
    ran(*own, "q.safetensors")
    ran(*own, "again.safetensors")
    assert Path("q.safetensors").read_bytes() == Path("again.safetensors").read_bytes()
    corpus = load("q.safetensors").manifest.corpus
    assert (corpus.name, corpus.seed, corpus.n_windows, corpus.seqlen) == ("self", 7, 3, 32)
    told = ran(
        "evaluate", "MODEL", "--quantizer-path", "q.safetensors", "--dataset", "self", "--limit", "2", "--seqlen", "32"
    )
    assert "model on self, q.safetensors" in told
    assert "the model wrote this text; the loss on it compares caches, and is no loss on text" in told
    assert "2 windows of 32 tokens" in told


def test_own_text_has_no_overlapping_windows(ran: Callable[..., str]) -> None:
    told = ran("evaluate", "MODEL", "--abits", "4", "--dataset", "self", "--stride", "8")
    assert told == "evaluate: --stride: every window of --dataset self is a text of its own; remove --stride"


def test_conversations_need_a_template(ran: Callable[..., str], here: Path) -> None:
    chat = {"messages": [{"role": "user", "content": prose(0, 20)}, {"role": "assistant", "content": prose(1, 20)}]}
    (here / "chat.jsonl").write_text(f"{json.dumps(chat)}\n" * 3)
    command = ("calibrate", "MODEL", *SMALL, "--dataset", "chat.jsonl", "--nsamples", "2", "--quantizer-path", "q.pkl")
    assert "chat.jsonl, line 1: a conversation needs a tokenizer with a chat template" in ran(*command)
    (here / "model" / "chat_template.jinja").write_text(TEMPLATE)
    ran(*command)
    assert load("q.pkl").manifest.corpus.name == "chat.jsonl"


def test_conversations_are_read_as_the_template_writes_them(here: Path) -> None:
    (here / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (here / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' * 2)
    loaded = load_model(ModelConfig(model="model"))
    [tokens] = loaded.corpus("chat.jsonl", "calibration", "text").documents
    assert tokens.tolist() == [*loaded.encode("u: Hi"), loaded.tokenizer.eos_token_id] * 2


def test_bare_ids_are_checked_against_the_vocabulary(ran: Callable[..., str], here: Path) -> None:
    command = ("calibrate", "MODEL", *SMALL, "--dataset", "ids.bin", "--nsamples", "2", "--quantizer-path", "q.pkl")
    ids = np.random.default_rng(0).integers(0, 256, 500)
    (ids + 1).astype("<u2").tofile(here / "ids.bin")
    assert "ids.bin: expected token ids from 0 to 255; read as uint16" in ran(*command)
    ids.astype("<u2").tofile(here / "ids.bin")
    ran(*command)
    assert load("q.pkl").manifest.corpus.name == "ids.bin"
