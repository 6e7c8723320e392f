"""Prompts of tasks as a turn of a conversation."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.programs import save_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.sites import Site
from simquant.tasks import (
    TASKS,
    Item,
    Prediction,
    Task,
    TaskError,
    TaskOptions,
    answer,
    append_prediction,
    predict,
    read_predictions,
    score_predictions,
)
from simquant.tasks.item import Format
from simquant.tasks.prompt import prompt_ids, prompt_text

pytestmark = pytest.mark.shapes

MADE = ("passkey", "needle", "multi_key", "multi_value", "variables", "common_words")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
AS_TEXT_BY_THE_AUTHORS = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    """A token for each byte and, by itself, a start token, which the template writes, too."""
    save_tokenizer(tmp_path, bos_token="ÿ", chat_template=TEMPLATE)
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path, add_bos_token=True)
    found.update_post_processor()
    return found


def options(tokenizer: Any, format: Format, **changes: Any) -> TaskOptions:
    settings = {"context_tokens": 4000, "limit": 6, "lengths": (700,), "format": format, **changes}
    return TaskOptions(count_tokens=lambda text: len(prompt_ids(tokenizer, text, format)), **settings)


def test_a_chat_prompt_is_a_turn_with_one_start_token(tokenizer: PreTrainedTokenizerFast) -> None:
    start = tokenizer.bos_token_id
    plain, chat = (prompt_ids(tokenizer, "Who?", format) for format in ("plain", "chat"))
    assert (plain[0], plain.count(start)) == (chat[0], chat.count(start)) == (start, 1)
    assert tokenizer.decode(plain[1:]) == "Who?"
    assert tokenizer.decode(chat[1:]) == "user: Who?\nassistant: "


@pytest.mark.parametrize("format", ["plain", "chat"])
@pytest.mark.parametrize("name", MADE)
def test_lengths_count_the_whole_prompt(name: str, format: Format, tokenizer: PreTrainedTokenizerFast) -> None:
    for item in TASKS[name].items(options(tokenizer, format)):
        longest_sentence = 75  # bytes
        assert 700 - longest_sentence <= len(prompt_ids(tokenizer, item.prompt, item.format)) <= 700


@pytest.mark.parametrize("name", MADE)
def test_a_plain_prompt_begins_the_answer_and_a_chat_prompt_asks_twice(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain, chat = (TASKS[name].items(options(tokenizer, format))[0] for format in ("plain", "chat"))
    asked, _, begun = plain.prompt.rpartition("\nAnswer: ")
    assert begun
    question = asked.rpartition("\n\nQuestion: ")[2]
    assert chat.prompt.partition("\n\n")[0].endswith(question), "asked before the text"
    assert chat.prompt.rpartition("\n\n")[2] == question, "and behind it"
    assert plain.references == chat.references
    assert plain.stop == ("\n",)
    assert chat.stop == (), "the model ends its turn itself, and may write a list"
    assert chat.max_new_tokens > plain.max_new_tokens, "there is a sentence around the answer"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("passkey", "The pass key is **{}**."),
        ("passkey", "The pass key that is hidden in the text above is {}. Remember {}!"),
        ("multi_key", 'The number of the kettle is "{}".'),
        ("needle", "It is hidden in the {}, behind the door."),
        ("multi_value", "The numbers are:\n\n1. {}\n2. {}\n3. {}"),
        ("variables", "These are `{}`, `{}`, `{}` and `{}`."),
        ("common_words", "The three words are *{}*, *{}* and *{}*."),
    ],
)
def test_answers_in_a_sentence_are_right(name: str, sentence: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for item in TASKS[name].items(options(tokenizer, "chat")):
        told = sentence.format(*item.references, *item.references)
        assert TASKS[name].score(told, item) == 1
        assert TASKS[name].score(sentence.format(*["0"] * 8), item) == 0
        assert len(told) < 4 * item.max_new_tokens, "a token has some four letters"


def test_gsm8k_may_answer_in_paragraphs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    plain, chat = (TASKS["gsm8k"].items(options(tokenizer, format, data=tmp_path))[0] for format in ("plain", "chat"))
    assert (plain.format, chat.format) == ("plain", "chat")
    assert set(plain.stop) - set(chat.stop) == {"\n\n"}


@pytest.mark.parametrize("task", [task for name, task in TASKS.items() if name.startswith("longbench")])
def test_longbench_asks_as_its_authors_do(task: Task, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"input": "?", "context": "a", "answers": ["1"], "length": 1, "all_classes": ["1"], "_id": "0"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    [item] = task.items(options(tokenizer, "chat", data=tmp_path / "rows.jsonl"))
    dataset = task.name.partition(":")[2]
    assert item.format == ("plain" if dataset in AS_TEXT_BY_THE_AUTHORS else "chat")


def test_drift_goes_on_with_text(tokenizer: PreTrainedTokenizerFast) -> None:
    [item] = TASKS["drift"].items(options(tokenizer, "chat", texts=("Once",)))
    assert item.format == "plain"


def test_a_tokenizer_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    assert prompt_text(tokenizer, "Who?", "plain") == "Who?"
    with pytest.raises(TaskError, match=r"expected a tokenizer with a chat template; got one without\. Add chat_temp"):
        prompt_text(tokenizer, "Who?", "chat")
    with pytest.raises(TaskError, match="expected a tokenizer with a chat template"):
        TASKS["passkey"].items(options(tokenizer, "chat"))


def test_a_template_that_fails_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('a system message must come first') }}"
    with pytest.raises(TaskError, match="single user turn; got a system message must come first"):
        prompt_text(tokenizer, "Who?", "chat")


# --- files of predictions


class Letters:
    """A token for each letter from a to z and for some signs; a template of one letter."""

    eos_token_id = 63
    chat_template = "u"

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Encoding", (), {"input_ids": [ord(letter) % 63 for letter in text]})

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join(chr(64 + token) for token in tokens)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        [message] = messages
        return f"{self.chat_template}{message['content']}>"


def items(format: Format, *ids: str) -> list[Item]:
    return [
        Item(
            task="passkey",
            id=id,
            prompt=f"say {id} again and again",
            references=("1",),
            format=format,
            max_new_tokens=3,
        )
        for id in ids
    ]


def run(model: LlamaForCausalLM, path: Path, asked: list[Item], tokenizer: Any = None) -> None:
    sites = [Site(layer, *which) for layer in range(2) for which in (("key", "pre_rope"), ("value", None))]
    quantizers = {site: DynamicAffine(channels=16, bits=2) for site in sites}
    predict(model, tokenizer or Letters(), asked, quantizers, path)


def test_the_model_reads_the_turn(tiny_llama: LlamaForCausalLM) -> None:
    [chat] = items("chat", "a")
    plain = replace(chat, prompt=f"u{chat.prompt}>", format="plain")
    assert answer(tiny_llama, Letters(), chat) == answer(tiny_llama, Letters(), plain)


def test_a_file_remembers_its_format(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    run(tiny_llama, path, items("chat", "a", "b"))
    assert {prediction.format for prediction in read_predictions(path)} == {"chat"}
    before = path.read_bytes()
    run(tiny_llama, path, items("chat", "a", "b"))
    for other in (items("plain", "a"), items("plain", "c")):
        with pytest.raises(TaskError, match=r"expected answers to prompts of --task-format plain; got one .* chat"):
            run(tiny_llama, path, other)
    changed = Letters()
    changed.chat_template = "user "
    with pytest.raises(TaskError, match="expected an answer to this prompt"):
        run(tiny_llama, path, items("chat", "a"), changed)
    assert path.read_bytes() == before
    [result] = score_predictions(path)
    assert result.format == "chat"
    assert "asked by chat template, n = 2" in result.table()


def test_answers_of_two_formats_have_no_common_score(tmp_path: Path) -> None:
    for id, format in (("a", "plain"), ("b", "chat")):
        for side in ("fp", "quantized"):
            one = Prediction(task="passkey", id=id, side=side, text="1", references=("1",), format=format)
            append_prediction(tmp_path / "p.jsonl", one)
    with pytest.raises(
        TaskError, match="passkey: expected answers to prompts of one --task-format; got chat and plain"
    ):
        score_predictions(tmp_path / "p.jsonl")
