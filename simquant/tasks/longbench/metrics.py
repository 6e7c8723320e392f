"""Metrics of LongBench: similarity of an answer to a reference, from 0 (nothing in common) to 1 (equal)."""

import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

from artifacts.errors import InvalidValueError

Language = Literal["en", "zh"]

_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NOT_CODE = ("#", "//", "```")


def best(metric: Callable[[str, str], float], text: str, references: Iterable[str]) -> float:
    """Best score over the references; 0 without references."""
    return max((metric(text, reference) for reference in references), default=0.0)


def token_f1(text: str, reference: str, language: Language = "en") -> float:
    """Harmonic mean of precision and recall over bags of words, or of characters in Chinese.

    Words are compared in lower case, without ASCII punctuation and articles; characters without any punctuation.

    References
    ----------
    Rajpurkar et al., SQuAD, arXiv:1606.05250, section 6.1.

    Examples
    --------
    >>> token_f1("It was the red car.", "A red car")
    0.666...
    """
    found, wanted = (_answer_words(each) if language == "en" else _characters(each) for each in (text, reference))
    return _f1((Counter(found) & Counter(wanted)).total(), len(found), len(wanted), same=text == reference)


def rouge_l(text: str, reference: str, language: Language = "en") -> float:
    """Harmonic mean of precision and recall of the longest common subsequence of words, or of Chinese characters.

    Words are runs of letters and digits in lower case, not stemmed; the whole text is one sequence.

    References
    ----------
    Lin, ROUGE, ACL 2004 workshop, section 3.1, with equal weights of precision and recall.

    Examples
    --------
    >>> rouge_l("the cat sat on a mat", "The cat lay on the mat.")
    0.666...
    """
    found, wanted = (
        re.findall(r"[^\W_]+", each.lower()) if language == "en" else _characters(each) for each in (text, reference)
    )
    return _f1(common_subsequence(found, wanted), len(found), len(wanted), same=text == reference)


def class_match(text: str, reference: str, classes: Iterable[str]) -> float:
    """Score 1 / n for a text that names n classes, the right one included; else 0.

    A class name that is part of the right one, as `Number` is of `Number of something`, does not count.

    Examples
    --------
    >>> class_match("a city or a country", "city", ["city", "country", "sport"])
    0.5
    """
    if reference not in text:
        return 0.0
    others = {name for name in classes if name in text and name not in reference}
    return 1 / (1 + len(others))


def number_match(text: str, reference: str) -> float:
    """Share of the integers in the text that equal the first one of the reference (a count, or a paragraph's number).

    Raises
    ------
    ValueError
        If the reference holds no number.

    Examples
    --------
    >>> number_match("Paragraph 12, or 13", "Paragraph 12")
    0.5
    """
    wanted, found = (re.findall(r"\d+", each) for each in (reference, text))
    if not wanted:
        raise InvalidValueError(
            f"number_match: expected a number in the reference; got {reference!r:.100}. Correct the data"
        )
    return sum(int(number) == int(wanted[0]) for number in found) / len(found) if found else 0.0


def edit_similarity(text: str, reference: str) -> float:
    """Similarity of two lines by edit distance with insertions and deletions alone: share of the characters kept.

    The line is the first of the text that is not blank, a comment or a code fence, without surrounding blanks.

    Examples
    --------
    >>> edit_similarity("# add\\nreturn a+b", "return a-b")
    0.9
    """
    lines = (line.strip() for line in text.splitlines())
    found = next((line for line in lines if line and not line.startswith(_NOT_CODE)), "")
    wanted = reference.strip()
    return _f1(common_subsequence(found, wanted), len(found), len(wanted), same=text == reference)


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, bit-parallel.

    References
    ----------
    Hyyrö, Bit-parallel LCS-length computation revisited, AWOCA 2004.
    """
    # A row of the dynamic-programming table rises by 0 or 1 from one column to the next; bit i of `row` is 0 where it
    # rises at a[i]. Each item of b updates the whole row by one addition, whose carries move rises to the next match,
    # and one subtraction on integers of len(a) bits. The length is the number of rises, the zeros of the last row.
    places: defaultdict[Hashable, int] = defaultdict(int)
    for i, item in enumerate(a):
        places[item] |= 1 << i
    full = (1 << len(a)) - 1
    row = full
    for item in b:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _f1(n_common: int, n_found: int, n_wanted: int, *, same: bool) -> float:
    """F1 score from numbers of common, found and wanted words."""
    # Without words on either side (an empty answer against "the") the score is 1 only for equal texts.
    # 2 P R / (P + R) with P = common / found and R = common / wanted.
    return 2 * n_common / (n_found + n_wanted) if n_found + n_wanted else float(same)


def _answer_words(text: str) -> list[str]:
    return [word for word in text.lower().translate(_NO_PUNCTUATION).split() if word not in _ARTICLES]


def _characters(text: str) -> list[str]:
    return [
        c for c in text.lower().translate(_NO_PUNCTUATION) if not (c.isspace() or unicodedata.category(c)[0] == "P")
    ]
