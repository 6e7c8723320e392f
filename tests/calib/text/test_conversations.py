"""Conversations in files: both spellings, one stream through the chat template, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from calib.text.conversations import Message
from calib.text.corpus import CorpusError, load_corpus

CHATS = [
    [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}],
    [{"role": "system", "content": "Be"}, {"role": "user", "content": "é"}, {"role": "assistant", "content": ""}],
]

SHAREGPT = [
    [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}],
    [{"from": "system", "value": "Be"}, {"from": "human", "value": "é"}, {"from": "gpt", "value": ""}],
]


def to_bytes(text: str) -> list[int]:
    return list(text.encode())


def rendered(messages: Sequence[Message]) -> list[int]:
    """Special tokens from 256, bytes below."""
    roles = {"system": 256, "user": 257, "assistant": 258}
    return [token for message in messages for token in (roles[message["role"]], *to_bytes(message["content"]), 259)]


def read(path: Path, **options: Any) -> list[int]:
    [document] = load_corpus(str(path), "calibration", to_bytes, **{"chat": rendered} | options).documents
    return document.tolist()


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


STREAM = [token for chat in CHATS for token in rendered(chat)]


@pytest.mark.parametrize(
    ("name", "chats", "field"),
    [
        ("messages", CHATS, "text"),
        ("conversations", SHAREGPT, "text"),
        ("conversations", CHATS, "text"),
        ("dialogue", SHAREGPT, "dialogue"),
    ],
)
def test_conversations_follow_one_another_as_the_template_writes_them(
    tmp_path: Path, name: str, chats: list[Any], field: str
) -> None:
    records = [{name: chat, "id": number} for number, chat in enumerate(chats)]
    table = datasets.Dataset.from_list(records)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (write_lines(tmp_path / "a.jsonl", records), tmp_path / "a.parquet", tmp_path / "saved"):
        assert read(path, field=field) == STREAM


def test_text_comes_before_conversations(tmp_path: Path) -> None:
    records = [{"text": "plain", "messages": CHATS[0]}]
    assert read(write_lines(tmp_path / "a.jsonl", records)) == to_bytes("plain")
    assert read(write_lines(tmp_path / "a.jsonl", records), field="messages") == rendered(CHATS[0])


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([{"messages": CHATS[0]}, {"messages": []}], r"a\.jsonl, line 2: expected a list of messages; got \[\]"),
        ([{"messages": CHATS[0]}, {"text": "a"}], r"line 2: expected a list of messages; got None"),
        ([{"messages": [{"role": "user"}]}], r"line 1, message 1: expected `role` and `content`.*got \{'role': 'user'"),
        ([{"messages": [*CHATS[0], "x"]}], r"line 1, message 3: expected `role` and `content`.*got 'x'"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], r"line 1: the tokenizer's chat template refuses .*'tool'"),
        ([{"messages": "x"}], "line 1: expected text in the field 'text'"),
        ([{"text": "a"}, {"messages": CHATS[0]}], "line 2: expected text in the field 'text'"),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, records: list[Any], match: str) -> None:
    with pytest.raises(CorpusError, match=match) as refused:
        read(write_lines(tmp_path / "a.jsonl", records))
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_a_template_is_told(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line 1: a conversation needs a tokenizer with a chat template.*`text`"):
        read(write_lines(tmp_path / "a.jsonl", [{"messages": CHATS[0]}]), chat=None)
