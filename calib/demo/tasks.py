"""Retrieval tasks, whose answer is in the text: the first to suffer from a damaged cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calib.demo import lexicon
from calib.demo.draws import Draws
from calib.demo.stories import asides


@dataclass(frozen=True)
class Trial:
    """Prompt and answer of one trial of a task.

    Parameters
    ----------
    prompt : str
        Text before the answer, without the space that precedes it.
    answer : str
        Answer, with that space.
    """

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return f"{self.prompt}{self.answer}"


Task = Callable[[Draws, int, int], Trial]
"""Function of random draws, words of filler text, and number of questions, of which all but the last are answered."""


def passkey(draws: Draws, n_words: int, n_questions: int = 1, *, depth: float | None = None) -> Trial:
    """Task of a number of five digits, hidden in filler sentences; depth 0 is before all of them."""
    key = draws.between(10_000, 99_999)
    told = f"The pass key is {key}. Remember it: {key} is the pass key."
    text = _hide(draws, [told], n_words, depth)
    return _ask([text], [("What is the pass key? The pass key is", f"{key}.")] * n_questions)


def needle(draws: Draws, n_words: int, n_questions: int = 1, *, depth: float | None = None) -> Trial:
    """Task of the number of one thing, told in one sentence; on no page, and so not in `TASKS`."""
    thing, number = draws.pick(lexicon.OBJECTS), draws.between(1000, 9999)
    text = _hide(draws, [f"The number of the {thing} is {number}."], n_words, depth)
    asked = (f"What is the number of the {thing}? The number of the {thing} is", f"{number}.")
    return _ask([text], [asked] * n_questions)


def multi_key(draws: Draws, n_words: int, n_questions: int = 1) -> Trial:
    """Task of the numbers of several things, one of which is asked."""
    things = draws.sample(lexicon.OBJECTS, max(n_questions, draws.between(3, 8)))
    numbers = {thing: draws.between(1000, 9999) for thing in things}
    text = _hide(draws, [f"The number of the {thing} is {numbers[thing]}." for thing in things], n_words)
    asked = [
        (f"What is the number of the {thing}? The number of the {thing} is", f"{numbers[thing]}.")
        for thing in draws.sample(things, n_questions)
    ]
    return _ask([text], asked)


def multi_value(draws: Draws, n_words: int, n_questions: int = 1) -> Trial:
    """Task of several numbers of each of some things; all numbers of one thing are asked."""
    things = draws.sample(lexicon.OBJECTS, max(n_questions, draws.between(2, 3)))
    numbers = {thing: [draws.between(1000, 9999) for _ in range(draws.between(2, 3))] for thing in things}
    needles = [needle for thing in things for needle in _listed(thing, numbers[thing])]
    text = _hide(draws, needles, n_words)
    asked = []
    for thing in draws.sample(things, n_questions):
        before, _, answer = " ".join(_listed(thing, numbers[thing])).partition(" is ")
        asked.append((f"What are the numbers of the {thing}? {before} is", answer))
    return _ask([text], asked)


def variables(draws: Draws, n_words: int, n_questions: int = 1) -> Trial:
    """Task of variables that are set to a number, or to an earlier variable."""
    letters = draws.sample(lexicon.LETTERS, draws.between(max(n_questions, 3), 8))
    value: dict[str, int] = {}
    numbered: list[str] = []
    needles = []
    for letter in letters:
        if numbered and draws.chance(0.5):
            other = draws.pick(numbered)
            value[letter] = value[other]
            needles.append(f"Let {letter} be {other}.")
        else:
            value[letter] = draws.between(10, 99)
            numbered.append(letter)
            needles.append(f"Let {letter} be {value[letter]}.")
    text = _hide(draws, needles, n_words)
    asked = [(f"What is {letter}? {letter} is", f"{value[letter]}.") for letter in draws.sample(letters, n_questions)]
    return _ask([text], asked)


def common_words(draws: Draws, n_words: int, n_questions: int = 1) -> Trial:
    """Task of the most frequent word of a list."""
    rare = draws.sample(lexicon.OBJECTS, 16)
    length = max(20, n_words)
    common = rare.pop()
    words = [common if draws.chance(0.4) else draws.pick(rare) for _ in range(length)]
    return _ask([f"Words: {' '.join(words)}."], [("Which word is the most common? It is", f"{common}.")] * n_questions)


def copying(draws: Draws, n_words: int, n_questions: int = 1) -> Trial:
    """Task of repeating random words and numbers after some other text."""
    things = draws.sample(_ANY_WORDS, draws.between(4, 20))
    words = " ".join(str(draws.between(1000, 9999)) if draws.chance(0.3) else thing for thing in things)
    text = _hide(draws, [], n_words)
    return _ask([f"Remember these words: {words}.", text], [("Repeat the words:", f"{words}.")] * n_questions)


def arithmetic(draws: Draws, n_words: int, n_questions: int = 1) -> Trial:
    """Task of sums and differences of numbers up to ten."""
    text = _hide(draws, [], n_words)
    return _ask([text], [_sum(draws) for _ in range(max(n_questions, 4))])


_ANY_WORDS = (*lexicon.OBJECTS, *lexicon.ANIMALS, *lexicon.FOODS, *lexicon.NAMES, *lexicon.PLACES)

TASKS: Mapping[str, Task] = {
    "passkey": passkey,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "variables": variables,
    "common_words": common_words,
    "copying": copying,
    "arithmetic": arithmetic,
}


def _listed(thing: str, numbers: list[int]) -> list[str]:
    return [
        f"The {ordinal} number of the {thing} is {number}."
        for ordinal, number in zip(lexicon.ORDINALS, numbers, strict=False)
    ]


def _sum(draws: Draws) -> tuple[str, str]:
    a, b = draws.between(0, 10), draws.between(0, 10)
    if draws.chance(0.5):
        return f"{a} plus {b} is", f"{a + b}."
    return f"{a + b} minus {b} is", f"{a}."


def _hide(draws: Draws, needles: list[str], n_words: int, depth: float | None = None) -> str:
    """Needles in their order among filler sentences: at one depth, or at random places."""
    # Places are drawn in ascending order and filled from the last one, so that each stays valid.
    sentences = asides(draws, n_words) if n_words else []
    at_depth = None if depth is None else round(depth * len(sentences))
    places = sorted(draws.below(len(sentences) + 1) if at_depth is None else at_depth for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(place, needle)
    return " ".join(sentences)


def _ask(texts: list[str], questions: list[tuple[str, str]]) -> Trial:
    *answered, (last, answer) = questions
    parts = [*(text for text in texts if text), *(f"{question} {reply}" for question, reply in answered), last]
    return Trial(" ".join(parts), f" {answer}")
