"""The demo text is the same everywhere, its two streams differ, and its tasks have the answers in the text."""

import hashlib

import pytest

from calib.demo import lexicon
from calib.demo.draws import Draws
from calib.demo.pages import demo_text, page
from calib.demo.stories import asides, facts, story
from calib.demo.tasks import TASKS
from calib.demo.trials import trials

# Of the pages that the model was trained on: another digest means another text than that of the model card.
FIRST_PAGES = {
    "training": "f2e2bf08904ea41096b7de02ab341af1c6898a225b08eadcdfb0e84d0f826093",
    "held-out": "4425334cb9369a27b56efee8d13cac0ead0df027fba7bf9415bb8133f8a8b63b",
}


@pytest.mark.parametrize("split", ["training", "held-out"])
def test_first_pages_are_those_that_the_model_learnt_from(split):
    text = "\n\n".join(page(split, index) for index in range(50))
    assert hashlib.sha256(text.encode()).hexdigest() == FIRST_PAGES[split]


def test_a_page_follows_from_stream_and_number_alone():
    assert page("training", 7) == page("training", 7)
    assert page("training", 7) != page("training", 8)
    assert page("training", 7) != page("held-out", 7)


def test_streams_share_no_long_run_of_words():
    def runs(text):
        words = text.split()
        return {tuple(words[i : i + 32]) for i in range(len(words) - 32)}

    assert not runs(demo_text("training")) & runs(demo_text("held-out"))


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("n_words", [0, 100, 400])
def test_trials_of_a_task_end_in_a_space_and_the_answer(task, n_words):
    for trial in trials(task, n_words, 20):
        assert trial.answer.startswith(" ")
        assert trial.answer.endswith(".")
        assert not trial.prompt.endswith(" ")
        assert len(trial.text.split()) >= 0.7 * n_words


@pytest.mark.parametrize("task", ["passkey", "multi_key", "multi_value", "common_words", "copying"])
def test_what_is_asked_stands_in_the_text(task):
    for trial in trials(task, 50, 50):
        for word in trial.answer.rstrip(".").replace(",", "").split():
            assert word in trial.prompt


def test_variables_follow_their_chain():
    for trial in trials("variables", 30, 200):
        sentences = [words.rstrip(".").split() for words in trial.prompt.split("Let ")[1:]]
        value = {}
        for name, _, source, *_ in sentences:
            source = source.rstrip(".")
            value[name] = value.get(source, source)
        asked = trial.prompt.rpartition("What is ")[2].partition("?")[0]
        assert trial.answer == f" {value[asked]}."


def test_sums_are_right():
    for trial in trials("arithmetic", 0, 200):
        a, sign, b, _ = trial.prompt.split(". ")[-1].split()
        assert int(trial.answer.strip(" .")) == (int(a) + int(b) if sign == "plus" else int(a) - int(b))


def test_common_word_is_the_most_common():
    for trial in trials("common_words", 100, 50):
        words = trial.prompt.partition("Words: ")[2].partition(".")[0].split()
        assert trial.answer == f" {max(set(words), key=words.count)}."


def test_facts_hold_everywhere():
    known = [sentence for seed in range(40) for sentence in facts(Draws(f"fact {seed}"), 60).split(". ")]
    homes = {}
    for sentence in known:
        if " lives in " in sentence:
            who, _, town = sentence.rstrip(".").partition(" lives in ")
            assert homes.setdefault(who, town) == town
    assert len(homes) > 20


def test_vocabulary_is_rich_and_without_slips():
    text = " ".join([story(Draws(f"story {seed}")) for seed in range(300)] + asides(Draws("aside"), 5000))
    assert "{" not in text
    assert "}" not in text
    assert "  " not in text
    assert len(set(text.lower().split())) > 1000
    for wrong in (" a apple", " a old ", " an useful ", " a honest "):
        assert wrong not in text


def test_words_stand_once_in_their_list():
    for name, words in vars(lexicon).items():
        if name.isupper():
            assert len(words) == len(set(words)), name


def test_draws_reach_every_item_and_no_other():
    draws = Draws("all")
    assert {draws.between(3, 5) for _ in range(200)} == {3, 4, 5}
    assert sorted(draws.sample(range(8), 8)) == list(range(8))
