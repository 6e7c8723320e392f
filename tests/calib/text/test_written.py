"""Text that a model writes itself: its own distribution, whole windows, ends of documents and turns of a chat."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers.models import build, random_llama
from torch import Tensor

from calib.text import written
from calib.text.errors import CorpusError
from calib.text.script import Script
from calib.text.windows import sample_windows, split_windows
from calib.text.written import WrittenText
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import LoadedModel, load_model

pytestmark = pytest.mark.shapes

DOCUMENTS = Script(opening=(1,), turns=((2, 1),), ends=frozenset({2}))

ENDLESS = Script(opening=(1, 5), turns=(), ends=frozenset())

CHATML = (
    "{% for message in messages %}<|endoftext|>{{ message.role }}\n{{ message.content }}<|endoftext|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(model="demo"))


def text_of(model: Any, script: Script = DOCUMENTS, **options: Any) -> WrittenText:
    return WrittenText(model, script, options.pop("split", "calibration"), **options)


# --- the distribution


def test_tokens_are_drawn_from_the_exact_distribution() -> None:
    model, n_windows = random_llama(vocab_size=8), 4000
    windows = text_of(model, ENDLESS).windows(n_windows, seqlen=4, seed=0)
    counts = torch.zeros(8, 8).index_put((windows[:, 2], windows[:, 3]), torch.ones(n_windows), accumulate=True)
    with torch.no_grad():
        first = model(torch.tensor([[1, 5]])).logits[0, -1].softmax(-1)
        second = model(torch.tensor([[1, 5, token] for token in range(8)])).logits[:, -1].softmax(-1)
    pairs = first[:, None] * second
    deviations = (counts / n_windows - pairs) / (pairs * (1 - pairs) / n_windows).sqrt()
    assert deviations.abs().max() < 4.5  # standard errors, over 64 pairs
    assert deviations.pow(2).mean() < 2
    # The check tells a distribution at another temperature apart.
    colder = (first.log() * 2).softmax(-1)[:, None] * (second.log() * 2).softmax(-1)
    assert ((counts / n_windows - colder) / (colder * (1 - colder) / n_windows).sqrt()).abs().max() > 10


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])  # full attention, and a sliding window of 4
def test_every_token_follows_from_all_before_it(kind: str) -> None:
    """What a cache gives step by step is what one pass over the whole window gives."""
    model = build(kind)
    windows = text_of(model).windows(5, seqlen=40, seed=3)
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits
    for row, window in enumerate(windows):
        draws = written._draws(f"calibration 3 {row}", 40)
        for position in range(1, 40):
            [drawn] = written._drawn(logits[row, position - 1][None], draws[position][None])
            forced = int(window[position - 1]) == 2
            assert int(window[position]) == (1 if forced else drawn)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    ends = torch.tensor([0.0, 0.5, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert [written._drawn(logits, end[None]) for end in ends] == [[1], [3], [1], [3]]


# --- windows


@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_of_any_size_give_the_same_windows(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()
    whole = text_of(model).windows(7, seqlen=33, seed=0)
    monkeypatch.setattr(WrittenText, "_rows_at_once", lambda *_: size)
    assert whole.shape == (7, 33)
    assert torch.equal(text_of(model).windows(7, seqlen=33, seed=0), whole)


def test_windows_depend_on_seed_and_split_alone() -> None:
    model = random_llama()
    windows = text_of(model).windows(4, seqlen=20, seed=0)
    assert torch.equal(text_of(model).windows(4, seqlen=20, seed=0), windows)
    assert torch.equal(text_of(model).windows(2, seqlen=20, seed=0), windows[:2])
    others = [
        text_of(model).windows(4, seqlen=20, seed=1),
        text_of(model, split="evaluation").windows(4, seqlen=20, seed=0),
    ]
    assert len({tuple(row.tolist()) for found in (windows, *others) for row in found}) == 12


def test_windows_are_written_once() -> None:
    steps = []
    text = text_of(random_llama(), progress=lambda items: (steps.append(item) or item for item in items))
    windows = text.windows(3, seqlen=12, seed=0)
    assert torch.equal(text.windows(2, seqlen=12, seed=0), windows[:2])
    assert len(steps) == 11


def test_calibration_and_evaluation_take_the_windows_as_they_are() -> None:
    model = random_llama()
    sampled = sample_windows(text_of(model), n_windows=3, seqlen=16, seed=5)
    assert torch.equal(sampled, text_of(model).windows(3, seqlen=16, seed=5))
    held_out = text_of(model, split="evaluation")
    assert torch.equal(split_windows(held_out, seqlen=16, limit=3), held_out.windows(3, 16, 0))
    assert split_windows(held_out, seqlen=16).shape == (16, 16)
    with pytest.raises(ValueError, match="n_windows: expected at least 1; got 0"):
        split_windows(held_out, seqlen=16, limit=0)


def test_a_start_token_stands_before_another_opening_and_not_twice() -> None:
    text = text_of(random_llama())
    assert torch.equal(text.windows(2, 16, 0, start_token=1), text.windows(2, 16, 0))
    assert text.windows(2, 16, 0, start_token=9)[:, :2].tolist() == [[9, 1]] * 2


def test_windows_hold_more_than_the_opening() -> None:
    with pytest.raises(CorpusError, match="longer than the 2 tokens that every text of this model begins with; got 2"):
        text_of(random_llama(), ENDLESS).windows(1, 2, 0)


def test_as_many_windows_at_a_time_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()  # 2 layers, keys and values of 2 heads of 8 float32: 256 bytes a token
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 256 * 32 * 5))
    assert text_of(model)._rows_at_once(DOCUMENTS, 32) == 5
    assert text_of(model)._rows_at_once(DOCUMENTS, 32 * 6) == 1


# --- scripts


def follow(script: Script, drawn: list[int]) -> list[int]:
    writer = written._Writer(script)
    return [writer.after(token) for token in drawn]


def test_a_document_that_ends_is_followed_by_the_next() -> None:
    assert follow(DOCUMENTS, [7, 2, 9, 7, 2, 2, 7]) == [7, 2, 1, 7, 2, 1, 7]
    assert follow(ENDLESS, [7, 2, 9]) == [7, 2, 9]


def test_speakers_take_turns() -> None:
    chat = Script(opening=(1,), turns=((3, 10), (3, 20)), ends=frozenset({2, 3}))
    # 3 ends a message, 2 the text: both are followed by the header of the other speaker.
    assert follow(chat, [7, 3, 0, 8, 2, 0, 7, 3, 0]) == [7, 3, 10, 8, 3, 20, 7, 3, 10]


def test_a_header_without_special_tokens_may_be_written_by_the_model() -> None:
    chat = Script(opening=(1,), turns=((4, 5), (2, 6)), ends=frozenset({2}))
    assert follow(chat, [7, 4, 5, 8, 2, 0, 7]) == [7, 4, 5, 8, 2, 6, 7]


@pytest.mark.parametrize(
    ("bos", "eos", "opening", "turns"),
    [(1, 2, (1,), ((2, 1),)), (None, 2, (2,), ((2,),)), (2, 2, (2,), ((2,),)), (1, None, (1,), ())],
    ids=["both", "no start", "the same", "no end"],
)
def test_documents_begin_with_the_start_token_or_the_end_of_another(
    bos: int | None, eos: int | None, opening: tuple[int, ...], turns: tuple[tuple[int, ...], ...]
) -> None:
    script = Script.of(None, random_llama(bos_token_id=bos, eos_token_id=eos))
    assert (script.opening, script.turns) == (opening, turns)


def test_a_model_without_start_and_end_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"neither a start token .* nor an end token"):
        Script.of(None, random_llama(bos_token_id=None, eos_token_id=None))


def test_a_chat_template_is_taken_apart(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = demo.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", CHATML, raising=False)
    script = Script.of(tokenizer, demo.model)
    parts = [tokenizer.decode(part) for part in (script.opening, *script.turns)]
    end = "<|endoftext|>"
    assert parts == [f"{end}user\n", f"{end}\n{end}assistant\n", f"{end}\n{end}user\n"]
    assert script.ends == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ messages[0].content }}", "leaves out messages"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "leaves out messages, or what stands"),
        ("{{ raise_exception('no questions here') }}", "refuses a conversation: no questions here"),
    ],
)
def test_a_template_that_cannot_be_taken_apart(
    demo: LoadedModel, template: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.tokenizer, "chat_template", template, raising=False)
    with pytest.raises(CorpusError, match=match):
        Script.of(demo.tokenizer, demo.model)


def test_a_conversation_fills_its_window(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.tokenizer, "chat_template", CHATML, raising=False)
    script = Script.of(demo.tokenizer, demo.model)
    window: Tensor = WrittenText(demo.model, script, "calibration").windows(1, 200, 0)[0]
    assert len(window) == 200
    text = demo.tokenizer.decode(window)
    speakers = [part.split("\n")[0] for part in text.split("<|endoftext|>") if part.strip()]
    assert speakers[:3] == ["user", "assistant", "user"][: len(speakers)]
