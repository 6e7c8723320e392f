"""The metrics of texts against oracles of a few lines, written from their definitions."""

import random
import re
import string
from collections import Counter

import pytest

from simquant.tasks.longbench.metrics import (
    best,
    class_match,
    common_subsequence,
    edit_similarity,
    number_match,
    rouge_l,
    token_f1,
)

pytestmark = pytest.mark.shapes

WORDS = ["the", "a", "red", "Red", "car.", "car", "is", "7", "twenty-one", "(old)", "naïve", "an"]


def sentences(n: int = 300) -> list[tuple[str, str]]:
    draw = random.Random(3)
    return [tuple(" ".join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(2)) for _ in range(n)]


def longest_common(a: str | list[str], b: str | list[str]) -> int:
    """The table of the textbook."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a, 1):
        for j, right in enumerate(b, 1):
            same = table[i - 1][j - 1] + 1 if left == right else 0
            table[i][j] = max(same, table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def f_measure(n_common: int, found: list[str], wanted: list[str], same: bool) -> float:
    if not n_common:
        return float(same)
    precision, recall = n_common / len(found), n_common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def squad_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def test_token_f1_is_that_of_squad() -> None:
    for text, reference in sentences():
        found, wanted = squad_words(text), squad_words(reference)
        n_common = sum(min(n, Counter(wanted)[word]) for word, n in Counter(found).items())
        assert token_f1(text, reference) == pytest.approx(f_measure(n_common, found, wanted, text == reference))


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    for text, reference in sentences():
        found, wanted = (re.findall(r"\w+", each.lower()) for each in (text, reference))
        n_common = longest_common(found, wanted)
        assert rouge_l(text, reference) == pytest.approx(f_measure(n_common, found, wanted, text == reference))


def test_the_longest_common_subsequence_of_random_letters_is_that_of_the_table() -> None:
    draw = random.Random(5)
    for _ in range(300):
        a, b = ("".join(draw.choices("abcd", k=draw.randrange(80))) for _ in range(2))
        assert common_subsequence(a, b) == common_subsequence(b, a) == longest_common(a, b)


@pytest.mark.parametrize("metric", [token_f1, rouge_l, edit_similarity])
def test_a_score_is_symmetric_one_for_equals_and_never_out_of_range(metric) -> None:
    for text, reference in sentences():
        assert 0 <= metric(text, reference) <= 1
        assert metric(text, reference) == metric(reference, text)
        assert metric(text, text) == 1


@pytest.mark.parametrize(
    ("metric", "reference"), [(token_f1, "The"), (token_f1, "..."), (rouge_l, "..."), (edit_similarity, "  ")]
)
def test_an_empty_answer_scores_nothing_where_nothing_is_left_of_the_reference(metric, reference: str) -> None:
    assert metric("", reference) == metric(reference, "") == 0
    assert metric(reference, reference) == metric("", "") == 1


def test_the_order_of_words_matters_to_rouge_alone() -> None:
    assert token_f1("red old car", "car old red") == 1
    assert rouge_l("red old car", "car old red") == pytest.approx(1 / 3)


@pytest.mark.parametrize("metric", [token_f1, rouge_l])
def test_chinese_is_compared_by_characters(metric) -> None:
    assert metric("《北京》。 A", "北 京a", "zh") == 1
    assert metric("北京市", "北京", "zh") == pytest.approx(0.8)
    assert metric("北京市", "北京") == 0, "as words of a language with spaces the two differ"


def test_a_class_is_found_among_those_that_the_answer_names() -> None:
    classes = ["Number of something", "Number", "City", "Other location"]
    assert class_match("It is a City.", "City", classes) == 1
    assert class_match("City, or Other location", "City", classes) == 0.5
    assert class_match("Number of something", "Number of something", classes) == 1, "its parts do not count"
    assert class_match("Number of something", "Number", classes) == 0.5
    assert class_match("Other location", "City", classes) == 0


def test_a_number_is_found_among_those_that_the_answer_names() -> None:
    assert number_match("Paragraph 15", "Paragraph 15") == 1
    assert number_match("段落15。不是段落3", "段落15") == 0.5
    assert number_match("There are 7 of 20 or 7.", "7") == pytest.approx(2 / 3)
    assert number_match("Paragraph 150", "Paragraph 15") == number_match("none", "7") == 0
    with pytest.raises(ValueError, match="expected a number in the reference; got 'none'"):
        number_match("7", "none")


def test_code_is_compared_by_its_first_line_that_is_no_comment() -> None:
    answer = "\n```python\n# the sum\n// or so\n    return a + b\nprint(a)"
    assert edit_similarity(answer, "return a + b") == 1
    assert edit_similarity("return a", "print b") == pytest.approx(2 * longest_common("return a", "print b") / 15)
    assert edit_similarity("# only a comment", "return a") == 0


def test_the_nearest_reference_counts() -> None:
    assert best(token_f1, "blue car", ["green tree", "car"]) == pytest.approx(2 / 3)
    assert best(token_f1, "blue car", []) == 0
