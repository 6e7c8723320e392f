"""How near the text of an answer comes to a reference, from 0 (nothing in common) to 1 (the same)."""

import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

Language = Literal["en", "zh"]

_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NOT_CODE = ("#", "//", "```")


def best(metric: Callable[[str, str], float], text: str, references: Iterable[str]) -> float:
    """The score against the reference that the text comes nearest to; 0 where there is none."""
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
    """One over the number of classes that the text names, if the right one is among them.

    A name that is part of the right one, as `Number` is of `Number of something`, does not count against it.

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
    """Share of the whole numbers in the text that are the first one of the reference: a count, or a paragraph's.

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
        raise ValueError(f"number_match: expected a number in the reference; got {reference!r:.100}")
    return sum(int(number) == int(wanted[0]) for number in found) / len(found) if found else 0.0


def edit_similarity(text: str, reference: str) -> float:
    """Share of the characters of both lines that stay when only insertions and deletions turn one into the other.

    The line is the first of the text that is neither blank, nor a comment, nor the fence of a code block; blanks around
    it do not count.

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
    """Length of the longest common subsequence.

    One row of the usual table is the bits of an integer, in which a zero at i says that the length grows at a[i], so
    that a step over b costs a few operations on integers.

    References
    ----------
    Hyyrö, Bit-parallel LCS-length computation revisited, AWOCA 2004.
    """
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
    """Two sides of which nothing is left fit only if the texts were the same: no answer is not "the"."""
    return 2 * n_common / (n_found + n_wanted) if n_found + n_wanted else float(same)


def _answer_words(text: str) -> list[str]:
    return [word for word in text.lower().translate(_NO_PUNCTUATION).split() if word not in _ARTICLES]


def _characters(text: str) -> list[str]:
    return [
        c for c in text.lower().translate(_NO_PUNCTUATION) if not (c.isspace() or unicodedata.category(c)[0] == "P")
    ]
