"""Tasks: their items, how answers are scored, and files of answers that can be gone on with."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from artifacts.model.attention import attention_layers
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site
from simquant import CachePolicy, Chunking, NothingQuantizedError, packed_cache
from simquant.evaluation.figures import mean_and_stderr
from simquant.tasks import (
    TASKS,
    Answer,
    Item,
    Prediction,
    TaskError,
    TaskOptions,
    TaskResult,
    answer,
    append_prediction,
    predict,
    read_predictions,
    score_predictions,
)
from simquant.tasks.answers import first_number_fits, found_share
from simquant.tasks.drift import first_divergence
from simquant.tasks.gsm8k import EXAMPLES, flexible_match, strict_match

pytestmark = pytest.mark.shapes

GRIDS = ("passkey", "needle")
SYNTHETIC = ("multi_key", "multi_value", "variables", "common_words")
MADE = (*GRIDS, *SYNTHETIC)
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "


class Letters:
    """A token for each letter of the alphabet above; 63 ends a text."""

    eos_token_id = 63

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[ALPHABET.index(letter) for letter in text])

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join(ALPHABET[token] for token in tokens if token != self.eos_token_id)


def options(**changes: Any) -> TaskOptions:
    """Words are tokens."""
    settings = {"count_tokens": lambda text: len(text.split()), "context_tokens": 1000, "limit": 12}
    return TaskOptions(**{**settings, **changes})


def prediction(side: str = "fp", **changes: Any) -> Prediction:
    own = {"task": "passkey", "id": "a", "text": " 12.", "references": ("12",), "protocol": side, "tokens": (1, 2)}
    return Prediction(side=side, **{**own, **changes})


def written(path: Path, *predictions: Prediction) -> Path:
    for one in predictions:
        append_prediction(path, one)
    return path


def items(n: int = 3, task: str = "passkey", **changes: Any) -> list[Item]:
    prompts = [f"What did {ALPHABET[i : i + 30]} say" for i in range(n)]
    settings = {"task": task, "references": ("1",), "max_new_tokens": 5, **changes}
    return [Item(id=str(i), prompt=prompt, **settings) for i, prompt in enumerate(prompts)]


def everywhere(model: LlamaForCausalLM, make: Callable[[], Quantizer]) -> dict[Site, Quantizer]:
    sites = [Site(layer, "key", "pre_rope") for layer in range(2)] + [Site(layer, "value", None) for layer in range(2)]
    return {site: make() for site in sites}


def rough(bits: int = 2) -> Quantizer:
    return DynamicAffine(channels=16, bits=bits)


def exact() -> Quantizer:
    return Identity(channels=16)


# --- items


@pytest.mark.parametrize("name", MADE)
def test_items_follow_from_the_seed(name: str) -> None:
    again = TASKS[name].items(options(seed=3, lengths=(150,)))
    assert TASKS[name].items(options(seed=3, lengths=(150,))) == again
    assert TASKS[name].items(options(seed=3, lengths=(150,), limit=5)) == again[:5]
    other = TASKS[name].items(options(seed=4, lengths=(150,)))
    assert not {item.prompt for item in other} & {item.prompt for item in again}


@pytest.mark.parametrize("name", MADE)
def test_prompts_are_as_long_as_asked_but_for_a_sentence(name: str) -> None:
    made = TASKS[name].items(options(lengths=(100, 300)))
    assert {item.cell["length"] for item in made} == {100, 300}
    for item in made:
        assert item.cell["length"] - 15 <= len(item.prompt.split()) <= item.cell["length"]


@pytest.mark.parametrize("name", MADE)
def test_the_answer_stands_in_the_prompt_and_scores_one(name: str) -> None:
    for item in TASKS[name].items(options(lengths=(120,))):
        assert item.references
        assert found_share(item.prompt, item.references) == 1
        assert TASKS[name].score(f" {', '.join(item.references)}.", item) == 1
        assert TASKS[name].score(" none of 00 them", item) == 0


@pytest.mark.parametrize("name", MADE)
def test_ids_are_unique_and_cells_are_dealt_in_turn(name: str) -> None:
    made = TASKS[name].items(options(lengths=(100, 200), depths=(0.0, 0.5, 1.0)))
    assert len({item.id for item in made}) == len(made) == 12
    cells = [tuple(item.cell.values()) for item in made]
    n_cells = 6 if name in GRIDS else 2
    assert len(set(cells[:n_cells])) == n_cells
    assert cells == cells[:n_cells] * (12 // n_cells)


@pytest.mark.parametrize("name", GRIDS)
def test_depth_says_where_the_needle_stands(name: str) -> None:
    made = TASKS[name].items(options(lengths=(400,), depths=(0.0, 0.25, 1.0), limit=3))
    for item in made:
        body = item.prompt.split("\n\n")[1]
        at = re.search(rf"\b{item.references[0]}\b", body)
        assert at is not None
        assert at.start() / len(body) == pytest.approx(item.cell["depth"], abs=0.06)


def test_variables_are_set_before_they_are_used() -> None:
    for item in TASKS["variables"].items(options(lengths=(200,))):
        at = [item.prompt.index(f"Variable {reference} is set") for reference in item.references]
        assert at == sorted(at)


def test_all_values_of_a_chain_are_reached_by_following_it() -> None:
    for item in TASKS["variables"].items(options()):
        told = dict(re.findall(r"Variable (\w+) is set to (\w+)\.", item.prompt))
        value = re.search(r"hold the value (\d+)", item.prompt)
        assert value is not None

        def follow(name: str, told: dict[str, str] = told) -> str:
            return follow(told[name]) if name in told else name

        assert {name for name in told if follow(name) == value.group(1)} == set(item.references)


@pytest.mark.parametrize("n_tokens", [45, 60, 300])
def test_common_words_are_the_most_common(n_tokens: int) -> None:
    for item in TASKS["common_words"].items(options(lengths=(n_tokens,))):
        listed = item.prompt.split("\n\n")[1].split()[1:]
        ranked = sorted(set(listed), key=listed.count, reverse=True)
        assert set(ranked[:3]) == set(item.references)
        assert listed.count(ranked[2]) > listed.count(ranked[3])


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"lengths": (995,)}, "at most 984 tokens"), ({"lengths": (9,)}, "which the question alone needs; got 9")],
)
def test_lengths_that_cannot_be_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(TaskError, match=told):
        TASKS["passkey"].items(options(**changes))


@pytest.mark.parametrize("changes", [{"limit": 0}, {"lengths": (0,)}, {"depths": (1.5,)}, {"lengths": ()}])
def test_options_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="tasks: expected"):
        options(**changes)


def test_without_lengths_the_longest_usual_one_that_fits_is_taken() -> None:
    assert {item.cell["length"] for item in TASKS["passkey"].items(options(context_tokens=700))} == {512}
    assert {item.cell["length"] for item in TASKS["passkey"].items(options(context_tokens=200))} == {184}


# --- scores


@pytest.mark.parametrize(
    ("text", "share"), [("cup and HAT", 1.0), ("cups, hat", 0.5), ("", 0.0), ("hat hat", 0.5), ("(cup)", 0.5)]
)
def test_found_share_counts_whole_words(text: str, share: float) -> None:
    words = re.sub(r"\W", " ", text.lower()).split()
    assert found_share(text, ("cup", "hat")) == share == sum(one in words for one in ("cup", "hat")) / 2


@pytest.mark.parametrize(
    ("text", "right"), [(" 123.", 1), ("It is 123", 1), ("1234", 0), ("12 or 123", 0), ("", 0), ("none", 0)]
)
def test_only_the_first_number_counts(text: str, right: int) -> None:
    assert first_number_fits(text, ("123",)) == right


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("2 + 2 = 4\n#### 4", "4", "4"),
        ("so 4\n####  $1,234.50 in all, or 7", "1234.50", "7"),
        ("she has -3", None, "-3"),
        ("#### x", None, None),
        ("#### 18.", "18", "18"),
        ("#### 5\n#### 6", "5", "6"),
    ],
)
def test_numbers_of_gsm8k_answers(text: str, strict: str | None, flexible: str | None) -> None:
    assert strict_match(text) == strict
    assert flexible_match(text) == flexible


def test_gsm8k_compares_numbers_not_spellings() -> None:
    item = Item(task="gsm8k", id="1", prompt="x", references=("1080",), max_new_tokens=9)
    assert TASKS["gsm8k"].score("#### 1,080.00", item) == 1
    assert TASKS["gsm8k"].score("#### 108", item) == 0
    both = TASKS["gsm8k"].others(
        prediction(text="it is 1080", references=("1080",)), prediction(text="1", references=("1080",))
    )
    assert list(both.values()) == [(1.0, 0.0)]


def test_the_solved_examples_are_right() -> None:
    for _, solution in EXAMPLES:
        sums = re.findall(r"([\d.]+(?: [-+*/] [\d.]+)+) = ([\d.]*\d)", solution)
        assert sums
        for left, right in sums:
            assert eval(left) == pytest.approx(float(right))
        assert strict_match(solution) == f"{float(sums[-1][1]):g}"


def test_drift_counts_agreeing_tokens() -> None:
    a, b = prediction(tokens=(1, 2, 3, 4)), prediction("quantized", tokens=(1, 9, 3))
    assert TASKS["drift"].scores(a, b) == (1.0, 0.5)
    assert list(TASKS["drift"].others(a, b).values()) == [(4.0, 1.0), (1.0, 0.0)]
    assert list(TASKS["drift"].others(a, a).values()) == [(4.0, 4.0), (1.0, 1.0)]
    assert first_divergence([1, 2], [1, 2, 3]) == 2


def test_drift_takes_the_texts_and_needs_some() -> None:
    made = TASKS["drift"].items(options(texts=("one", "two", "three"), limit=2))
    assert [item.prompt for item in made] == ["one", "two"]
    with pytest.raises(TaskError, match="drift: expected text"):
        TASKS["drift"].items(options())


# --- local data


def gsm8k_rows(n: int = 4) -> str:
    return "".join(
        json.dumps({"question": f"How many is {i}?", "answer": f"It is.\n#### {i}"}) + "\n" for i in range(n)
    )


def test_gsm8k_comes_from_a_file_or_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(gsm8k_rows())
    made = TASKS["gsm8k"].items(options(data=path, limit=3))
    assert made == TASKS["gsm8k"].items(options(data=tmp_path, limit=3))
    assert [item.references for item in made] == [("0",), ("1",), ("2",)]
    assert made[1].prompt.endswith("Question: How many is 1?\nAnswer:")
    assert made[1].prompt.count("#### ") == 8


def test_the_real_gsm8k_can_be_read(shared: Path) -> None:
    made = TASKS["gsm8k"].items(options(data=shared / "data" / "gsm8k-test.jsonl", limit=None))
    assert len(made) == 1319
    assert made[0].references == ("18",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "an empty file"),
        (gsm8k_rows(2) + "{broken\n" + gsm8k_rows(1), "line 3: expected a JSON object"),
        (gsm8k_rows(1) + '{"question": "How?"}\n', "line 2: expected the field 'answer', str; got only question"),
        (gsm8k_rows(1) + '{"question": 3, "answer": "#### 1"}\n', "line 2: expected the field 'question', str; got 3"),
        (gsm8k_rows(1) + "\n" + gsm8k_rows(1), "line 2: expected a JSON object; got an empty line"),
        ('{"question": "How?", "answer": "no idea"}\n', "line 1: expected an answer that ends in '#### '"),
        ("[1]\n", "line 1: expected a JSON object"),
    ],
)
def test_broken_data_is_refused_with_its_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(content)
    with pytest.raises(TaskError, match=re.escape(told)) as refused:
        TASKS["gsm8k"].items(options(data=path))
    assert str(path) in str(refused.value)


def test_data_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"gsm8k\.jsonl in the folder"):
        TASKS["gsm8k"].items(options(data=tmp_path))
    with pytest.raises(TaskError, match="Check the path"):
        TASKS["gsm8k"].items(options(data=tmp_path / "none.jsonl"))
    with pytest.raises(TaskError, match="--task-data"):  # the tests are offline
        TASKS["gsm8k"].items(options())


# --- files of predictions


def test_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    kept = [
        prediction(text="two\nlines\u2028and \u00e9", cell={"length": 5, "depth": 0.5}, choices=("a",)),
        prediction("quantized", quantized_fraction=0.75, n_prompt_tokens=8, prompt_digest="ab"),
    ]
    assert read_predictions(written(tmp_path / "p.jsonl", *kept)) == kept


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: expected a JSON object"),
        ("", "line 2: expected a JSON object"),
        ("3", "line 2: expected a JSON object"),
        ('{"task": "passkey"}', r"line 2: expected the fields of a prediction; missing \['id', 'side'"),
        ('{"x": 1, "task": "a", "id": "b", "side": "fp", "text": "", "references": [], "cell": {}}', r"unknown \['x'"),
        (
            '{"task": "a", "id": "b", "side": "left", "text": "", "references": [], "cell": {}}',
            "line 2: side cannot be",
        ),
        ('{"task": "a", "id": 7, "side": "fp", "text": "", "references": [], "cell": {}}', "line 2: id cannot be 7"),
        (prediction().to_line(), "line 2: expected each prediction once; got passkey a fp again"),
    ],
)
def test_a_broken_line_is_refused_with_its_number(tmp_path: Path, line: str, told: str) -> None:
    path = written(tmp_path / "p.jsonl", prediction())
    path.write_text(f"{path.read_text()}{line}\n{prediction('quantized').to_line()}\n")
    with pytest.raises(TaskError, match=told):
        read_predictions(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cell": {"a": [1]}},
        {"cell": {"a": True}},
        {"cell": {"a": math.nan}},
        {"references": [1]},
        {"choices": [None]},
        {"tokens": ["a"]},
        {"tokens": [True]},
        {"side": ["fp"]},
        {"n_prompt_tokens": -1},
        {"quantized_fraction": True},
        {"quantized_fraction": math.nan},
        {"quantized_fraction": 1.5},
    ],
)
def test_a_field_that_holds_something_else_is_refused_with_its_line(tmp_path: Path, wrong: dict[str, Any]) -> None:
    [name] = wrong
    path = written(tmp_path / "p.jsonl", prediction())
    line = json.dumps(json.loads(prediction("quantized").to_line()) | wrong)
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(TaskError, match=f"line 2: {name} cannot be"):
        score_predictions(path)


@pytest.mark.parametrize("task", ["needle", "passkey", "gsm8k", "longbench:hotpotqa"])
def test_answers_without_a_reference_are_refused(tmp_path: Path, task: str) -> None:
    both = [prediction(side, task=task, references=()) for side in ("fp", "quantized")]
    with pytest.raises(TaskError, match=f"{task} a: expected a reference"):
        score_predictions(written(tmp_path / "p.jsonl", *both))


def test_answers_without_tokens_cannot_drift(tmp_path: Path) -> None:
    both = [prediction(side, task="drift", tokens=()) for side in ("fp", "quantized")]
    with pytest.raises(TaskError, match="drift a: expected the tokens of both answers"):
        score_predictions(written(tmp_path / "p.jsonl", *both))


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(TaskError, match="an empty file"):
        score_predictions(tmp_path / "empty.jsonl")
    with pytest.raises(TaskError, match="Check the path"):
        score_predictions(tmp_path / "none.jsonl")


# --- results


def test_standard_errors_are_those_of_the_textbook() -> None:
    values = [0.0, 1.0, 1.0, 0.25]
    mean, stderr = mean_and_stderr(values)
    assert mean == sum(values) / 4
    assert stderr == pytest.approx(float(torch.tensor(values).std()) / 2)
    assert math.isnan(mean_and_stderr([1.0])[1])


def scored(tmp_path: Path, fp: Sequence[bool], quantized: Sequence[bool]) -> TaskResult:
    path = tmp_path / "p.jsonl"
    for index, both in enumerate(zip(fp, quantized, strict=True)):
        for side, right in zip(("fp", "quantized"), both, strict=True):
            text = "12" if right else "13"
            written(path, prediction(side, id=str(index), text=text, cell={"length": 10 * (1 + index % 2)}))
    [result] = score_predictions(path)
    return result


def test_differences_are_paired_by_item(tmp_path: Path) -> None:
    result = scored(tmp_path, [True, True, True, False], [True, False, True, False])
    assert (result.n, result.fp, result.quantized, result.difference) == (4, 0.75, 0.5, -0.25)
    assert result.difference_stderr == pytest.approx(float(torch.tensor([0.0, -1.0, 0.0, 0.0]).std()) / 2)
    assert result.difference_stderr < math.hypot(result.fp_stderr, result.quantized_stderr)


def test_cells_add_up_to_the_whole(tmp_path: Path) -> None:
    result = scored(tmp_path, [True, True, True, False], [True, False, True, False])
    assert [(cell["length"], cell["n"], cell["fp"], cell["quantized"]) for cell in result.cells] == [
        (10, 2, 1.0, 1.0),
        (20, 2, 0.5, 0.0),
    ]
    assert sum(cell["n"] * cell["fp"] for cell in result.cells) == result.n * result.fp


def test_results_go_to_json_and_to_a_table(tmp_path: Path) -> None:
    result = scored(tmp_path, [True], [False])
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert found["fp_stderr"] is None
    assert (found["n"], found["fp"], found["quantized"], found["protocol"]) == (1, 1.0, 0.0, "quantized")
    assert "passkey" in result.table()
    assert "length 10: 1.000 -> 0.000, n = 1" in result.table()


def test_items_of_one_side_only_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "p.jsonl", prediction(), prediction(id="b"), prediction("quantized"))
    [result] = score_predictions(path)
    assert result.n == 1
    assert "1 answers of one model only" in caplog.text


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([prediction("quantized"), prediction("quantized", id="b", protocol="x")], "expected answers of one protocol"),
        ([prediction("quantized", task="passkeys")], "passkeys: expected a task .*; did you mean passkey"),
        ([prediction("quantized", id="b")], "expected items that both models answered"),
        ([prediction("quantized", prompt_digest="x")], "expected the same prompt, references and choices for both"),
        ([prediction("quantized", choices=("x",))], "expected the same prompt, references and choices for both"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(tmp_path: Path, others: list[Prediction], told: str) -> None:
    with pytest.raises(TaskError, match=told):
        score_predictions(written(tmp_path / "p.jsonl", *others, prediction()))


def test_items_that_do_not_count_are_not_scored(tmp_path: Path) -> None:
    right, wrong = (
        [prediction(side, id=side_id, text=text) for side in ("fp", "quantized")]
        for side_id, text in (("a", "12"), ("b", "13"))
    )
    path = written(tmp_path / "p.jsonl", *right, *wrong)
    [result] = score_predictions(path, only={("passkey", "a")})
    assert (result.n, result.fp) == (1, 1.0)


def test_a_file_in_which_nothing_was_quantized_is_refused(tmp_path: Path) -> None:
    nothing = [prediction("quantized", id=id, quantized_fraction=0.0) for id in "ab"]
    with pytest.raises(NothingQuantizedError, match="passkey: fewer than 16 bits were asked for"):
        score_predictions(written(tmp_path / "p.jsonl", *nothing, prediction(), prediction(id="b")))


# --- answers


def test_answers_are_what_generate_gives(tiny_llama: LlamaForCausalLM) -> None:
    for item in items(max_new_tokens=12):
        ids = torch.tensor([Letters()(item.prompt).input_ids])
        whole = tiny_llama.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=63, pad_token_id=63)
        found = answer(tiny_llama, Letters(), item)
        assert found.tokens == tuple(whole[0, ids.shape[1] :].tolist())
        assert found.n_prompt_tokens == ids.shape[1]


def test_identities_answer_as_the_exact_model(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    predict(tiny_llama, Letters(), items(), everywhere(tiny_llama, exact), tmp_path / "p.jsonl")
    found = {(p.id, p.side): p for p in read_predictions(tmp_path / "p.jsonl")}
    assert len(found) == 6
    for id in "012":
        assert found[id, "fp"].tokens == found[id, "quantized"].tokens
        assert found[id, "quantized"].quantized_fraction is None


def test_an_answer_ends_before_a_stop_string_or_with_the_end_token(tiny_llama: LlamaForCausalLM) -> None:
    [item] = items(1, max_new_tokens=12)
    whole = answer(tiny_llama, Letters(), item)
    stop = whole.text[4:6]
    cut = answer(tiny_llama, Letters(), replace(item, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.tokens) == len(cut.text) + 2
    tokenizer = Letters()
    tokenizer.eos_token_id = whole.tokens[3]
    first = whole.tokens.index(whole.tokens[3])
    assert answer(tiny_llama, tokenizer, item).tokens == whole.tokens[: first + 1]


def test_the_steps_of_the_prompt_do_not_change_an_exact_answer(tiny_llama: LlamaForCausalLM) -> None:
    [item] = items(1)
    assert answer(tiny_llama, Letters(), item) == answer(
        tiny_llama, Letters(), item, chunking=Chunking(prefill_tokens=3, chunk_tokens=2)
    )


def test_a_prompt_beyond_the_context_is_refused_or_cut_in_the_middle(tiny_llama: LlamaForCausalLM) -> None:
    long = Item(task="t", id="i", prompt="a" * 70 + "b" * 70, max_new_tokens=8)
    with pytest.raises(TaskError, match=r"t i: expected a prompt of at most 120 tokens.*got 140"):
        answer(tiny_llama, Letters(), long)
    found = answer(tiny_llama, Letters(), replace(long, overlong="cut_middle"))
    short = replace(long, prompt="a" * 60 + "b" * 60)
    assert found == answer(tiny_llama, Letters(), short)


def test_an_item_without_prompt_or_room_is_refused() -> None:
    for changes in ({"prompt": ""}, {"max_new_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(ValueError, match="expected a prompt"):
            Item(**{"task": "t", "id": "i", "prompt": "x", "max_new_tokens": 1, **changes})


# --- predicting


def run(model: LlamaForCausalLM, path: Path, asked: list[Item] | None = None, **changes: Any) -> list[Item]:
    """The items that were really asked."""
    seen: list[Item] = []

    def note(own: list[Item]) -> list[Item]:
        seen.extend(own)
        return own

    quantizers = changes.pop("quantizers", everywhere(model, rough))
    predict(model, Letters(), items() if asked is None else asked, quantizers, path, progress=note, **changes)
    return seen


def test_scores_from_a_file_are_those_of_the_answers(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    asked, quantizers = items(4, references=("a",), task="needle", max_new_tokens=9), everywhere(tiny_llama, rough)
    run(tiny_llama, tmp_path / "p.jsonl", asked)
    [result] = score_predictions(tmp_path / "p.jsonl")

    def direct(item: Item) -> tuple[Answer, Answer]:
        plain = answer(tiny_llama, Letters(), item)
        with packed_cache(tiny_llama, quantizers) as new_cache:
            return plain, answer(tiny_llama, Letters(), item, cache=new_cache())

    both = [[TASKS["needle"].score(one.text, item) for one in direct(item)] for item in asked]
    assert (result.fp, result.quantized) == tuple(sum(scores) / 4 for scores in zip(*both, strict=True))
    assert result.quantized_fraction == 1.0


def test_an_interrupted_run_goes_on_where_it_stopped(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert len(run(tiny_llama, whole)) == 6
    content = whole.read_bytes()
    ends = [end.end() for end in re.finditer(b"\n", content)]
    for kept, at in ((0, ends[0] - 5), (2, ends[1]), (4, ends[3] + 40), (6, len(content))):
        cut.write_bytes(content[:at])
        assert len(run(tiny_llama, cut)) == 6 - kept
        assert cut.read_bytes() == content


def test_a_run_stopped_inside_a_character_goes_on(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path, asked = tmp_path / "p.jsonl", items(cell={"place": "caf\u00e9"})
    run(tiny_llama, path, asked)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex("\u00e9".encode()) + 1])
    assert len(run(tiny_llama, path, asked)) == 1
    assert path.read_bytes() == content


def test_a_larger_limit_asks_only_what_is_new(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path / "p.jsonl", items(2))
    assert len(run(tiny_llama, tmp_path / "p.jsonl", items(3))) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policy": CachePolicy(sink_tokens=1)}, "expected answers of this protocol"),
        ({"chunking": Chunking(prefill_tokens=4)}, "expected answers of this protocol"),
        ({"bits": 3}, "expected answers of this protocol"),
        ({"asked": [replace(item, prompt="another one") for item in items()]}, "expected an answer to this prompt"),
        ({"asked": items(references=("2",))}, "expected an answer to this prompt, with these references"),
        ({"asked": items(choices=("1", "2"))}, "expected an answer to this prompt, with these references"),
        ({"asked": items() + items(1)}, "expected one item of that id; got two"),
    ],
)
def test_a_file_of_another_run_is_refused(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    run(tiny_llama, tmp_path / "p.jsonl")
    before = (tmp_path / "p.jsonl").read_bytes()
    bits = changes.pop("bits", 2) if "bits" in changes else 2
    with pytest.raises(TaskError, match=told):
        run(tiny_llama, tmp_path / "p.jsonl", quantizers=everywhere(tiny_llama, lambda: rough(bits)), **changes)
    assert (tmp_path / "p.jsonl").read_bytes() == before


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_asked(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match="passkey 2: expected a prompt of at most 123 tokens"):
        run(tiny_llama, tmp_path / "p.jsonl", [*items(2), replace(items(3)[2], prompt="a" * 124)])
    assert not (tmp_path / "p.jsonl").exists()


def of_norm(model: LlamaForCausalLM) -> None:
    model.model.norm.weight.mul_(1.5)


def behind_the_first_row(model: LlamaForCausalLM) -> None:
    for weight in model.parameters():
        weight[1:] += 0.5 * (weight.ndim == 2)


def of_another_precision(model: LlamaForCausalLM) -> None:
    model.bfloat16()


@pytest.mark.parametrize("change", [of_norm, behind_the_first_row, of_another_precision])
def test_other_weights_are_another_model(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, change: Callable[[LlamaForCausalLM], None]
) -> None:
    tiny_llama.bfloat16().float()  # values that both precisions hold
    run(tiny_llama, tmp_path / "p.jsonl")
    with torch.no_grad():
        change(tiny_llama)
    with pytest.raises(TaskError, match="expected answers of this protocol"):
        run(tiny_llama, tmp_path / "p.jsonl")


def test_a_task_in_which_nothing_is_quantized_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    policy = CachePolicy(residual_tokens=100)
    with pytest.raises(NothingQuantizedError, match="no token was quantized in 3 prompts"):
        run(tiny_llama, tmp_path / "p.jsonl", policy=policy)
    assert {p.side for p in read_predictions(tmp_path / "p.jsonl")} == {"quantized"}
    sixteen = everywhere(tiny_llama, exact)
    run(tiny_llama, tmp_path / "exact.jsonl", policy=policy, quantizers=sixteen)


def test_answers_that_an_exact_prefill_gives_alone_are_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """The first token of an answer reads what the first step reads."""
    policy, one_token = CachePolicy(exact_prefill=True), items(max_new_tokens=1)
    with pytest.raises(NothingQuantizedError, match="an exact prefill answers with its first token"):
        run(tiny_llama, tmp_path / "one.jsonl", one_token, policy=policy)
    run(tiny_llama, tmp_path / "steps.jsonl", one_token, policy=policy, chunking=Chunking(prefill_tokens=8))
    run(tiny_llama, tmp_path / "more.jsonl", items(max_new_tokens=2), policy=policy)
    for name in ("steps", "more"):
        assert score_predictions(tmp_path / f"{name}.jsonl")[0].quantized_fraction == 1


def test_answers_whose_windows_hold_exact_tokens_alone_are_refused(tmp_path: Path) -> None:
    """All sliding layers saw the recent tokens alone, and the share of quantized ones was told all the same."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=4)).eval()
    policies = [CachePolicy(residual_tokens=n) for n in (4, 3)]
    with pytest.raises(NothingQuantizedError):
        run(model, tmp_path / "exact.jsonl", policy=policies[0])
    run(model, tmp_path / "codes.jsonl", policy=policies[1])


def test_the_protocol_line_says_what_was_run(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    policy = CachePolicy(sink_tokens=1, residual_tokens=4, exact_prefill=True)
    run(tiny_llama, tmp_path / "p.jsonl", policy=policy, chunking=Chunking(prefill_tokens=8, chunk_tokens=2))
    [result] = score_predictions(tmp_path / "p.jsonl")
    for phrase in ("packed cache", "prefill of 8 tokens", "exact prefill", "pre-RoPE", policy.describe(), "greedy"):
        assert phrase in result.protocol


def test_the_model_is_as_it_was(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.train()
    implementation = tiny_llama.config._attn_implementation
    run(tiny_llama, tmp_path / "p.jsonl")
    assert tiny_llama.training
    assert tiny_llama.config._attn_implementation == implementation
    assert not any(layer.module._forward_pre_hooks for layer in attention_layers(tiny_llama))
