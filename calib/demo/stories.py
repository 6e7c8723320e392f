"""Short stories, questions about them, and facts of a small invented world."""

import re
from collections.abc import Sequence
from functools import cache

from calib.demo import lexicon
from calib.demo.draws import Draws

_WORDS: dict[str, Sequence[str]] = {
    "name": lexicon.NAMES,
    "object": lexicon.OBJECTS,
    "adjective": lexicon.ADJECTIVES,
    "colour": lexicon.COLOURS,
    "place": lexicon.PLACES,
    "animal": lexicon.ANIMALS,
    "food": lexicon.FOODS,
    "job": lexicon.JOBS,
    "feeling": lexicon.FEELINGS,
    "weather": lexicon.WEATHER,
    "material": lexicon.MATERIALS,
    "time": lexicon.TIMES,
    "town": lexicon.TOWNS,
    "found": lexicon.FOUND,
    "went": lexicon.WENT,
    "said": lexicon.SAID,
}

# A beat is told by one of its sentences. Words in braces that the cast of a story holds stay the same all through it;
# the others are drawn anew each time.
_BEATS: tuple[tuple[str, ...], ...] = (
    (
        "On a {weather} {time} {hero} the {hero_job} {went} to the {goal}.",
        "One {weather} {time} {hero}, a {hero_job} from {hero_town}, {went} to the {goal}.",
        "{hero} was a {hero_job} and lived in {hero_town}. That {time} {hero} {went} to the {goal}.",
    ),
    (
        "There {hero} found a {look} {thing} made of {stuff}.",
        "In the {goal} lay a {look} {thing}. It was made of {stuff}.",
        "Under a {adjective} {object} {hero} saw a {look} {thing} made of {stuff}.",
    ),
    (
        '"What a {look} {thing}!" {said} {hero}.',
        "{hero} was {feeling}, sat down and ate some {food}.",
        "A {adjective} {animal} looked at the {thing} and {went} away.",
        '"Whose {thing} is this?" {hero} {said}. Nobody was there.',
    ),
    (
        "Then {friend} the {friend_job} came along with a {pet}.",
        "Soon {friend}, who was a {friend_job}, arrived. A {pet} came too.",
        "{friend} and a {pet} were waiting outside. {friend} was {feeling}.",
    ),
    (
        "The {thing} belonged to {friend}, who had lost it near the {lair}.",
        '"That is my {thing}," {said} {friend}. "I lost it near the {lair}."',
        "{friend} had lost the {look} {thing} near the {lair}.",
    ),
    (
        "The {pet} took the {thing} and {went} to the {lair}.",
        "Together they {went} to the {lair}. The {pet} was {feeling}.",
        "They {found} a {colour} {object} and {went} to the {lair}.",
    ),
    (
        "{friend} gave {hero} {gift} for the {thing}.",
        '"Thank you," {said} {friend}, and gave {hero} {gift}.',
        "For the {thing} {hero} was given {gift}.",
    ),
    (
        "In the end {hero} was {mood}.",
        "By {time} {hero} was {mood}, and {friend} {went} home.",
        "That {time} {hero} was {mood} and told everybody in {hero_town} about it.",
    ),
)

_QUESTIONS = (
    ("What did {hero} find?", "a {look} {thing}"),
    ("What was the {thing} made of?", "{stuff}"),
    ("Where did {hero} go?", "to the {goal}"),
    ("Who came along?", "{friend}"),
    ("Whose {thing} was it?", "it belonged to {friend}"),
    ("Where was the {thing} lost?", "near the {lair}"),
    ("What was {hero} given?", "{gift}"),
    ("Which animal came along?", "a {pet}"),
    ("How was {hero} in the end?", "{mood}"),
    ("Where did {hero} live?", "in {hero_town}"),
)

_ASIDES = (
    "A {colour} {animal} {went} over the {place}.",
    "The {adjective} {animal} and the {adjective} {animal} shared some {food}.",
    "Somebody {found} a {adjective} {object} near the {place}.",
    "The {job} and the {job} talked about {food} and {food}.",
    "It was {weather} in {town}, and nobody {went} to the {place}.",
    '"I would like some {food}," {said} {name}.',
    "{name} put the {object} beside the {object}.",
    "Every {time} the {job} {found} a {material} {object}.",
    "Behind the {place} stood a {adjective} {object} and a {colour} {object}.",
    "{name} was {feeling} because the {object} was {adjective}.",
    "The {animal} lived between the {place} and the {place}.",
    "Nobody knew why the {colour} {object} was so {adjective}.",
    "{name} asked the {job} for {food}, but there was only {food}.",
    "The road from {town} to {town} was {adjective} and {adjective}.",
    "In the {place} people ate {food} with {food}.",
    "{name} and {name} {went} to the {place} with a {material} {object}.",
    "When it was {weather}, the {animal} slept in the {object}.",
    "The {object} was made of {material} and the {object} of {material}.",
    "The {adjective} {job} {said} that the {animal} was {feeling}.",
    "{name} {found} the {object} and gave it to {name}.",
)

# "an" before a vowel that is heard: umbrella and honest, but not useful.
_ARTICLE = re.compile(r"\b([Aa])(?= (?:[aeio]|u(?!s)|honest))")


class _Cast(dict[str, str]):
    """Words of a story by role; a word that has no role is drawn."""

    def __init__(self, draws: Draws, roles: dict[str, str]) -> None:
        super().__init__(roles)
        self._draws = draws

    def __missing__(self, role: str) -> str:
        return self._draws.pick(_WORDS[role])


def story(draws: Draws) -> str:
    """Story of one paragraph, and some questions about it with their answers."""
    cast = _cast(draws)
    told = []
    for beat in _BEATS:
        told.append(draws.pick(beat))
        if draws.chance(0.3):
            told.append(draws.pick(_ASIDES))
    asked = [f"{question} {answer}." for question, answer in draws.sample(_QUESTIONS, draws.between(1, 4))]
    return with_articles(" ".join([*told, *asked]).format_map(cast))


def asides(draws: Draws, n_words: int) -> list[str]:
    """Sentences without a story, at least `n_words` words of them."""
    cast, sentences, length = _Cast(draws, {}), [], 0
    while length < n_words:
        sentences.append(with_articles(draws.pick(_ASIDES).format_map(cast)))
        length += sentences[-1].count(" ") + 2
    return sentences


def facts(draws: Draws, n_words: int) -> str:
    """Sentences that are true in the demo world, wherever they stand."""
    known = _world()
    sentences, length = [], 0
    while length < n_words:
        sentences.append(draws.pick(known))
        length += sentences[-1].count(" ") + 2
    return " ".join(sentences)


def with_articles(text: str) -> str:
    """Text with `an` in place of `a` before vowels."""
    return _ARTICLE.sub(r"\1n", text)


def _cast(draws: Draws) -> _Cast:
    hero, friend = draws.sample(lexicon.NAMES, 2)
    goal, lair = draws.sample(lexicon.PLACES, 2)
    roles = {"hero": hero, "friend": friend, "goal": goal, "lair": lair}
    for who, name in (("hero", hero), ("friend", friend)):
        roles |= {f"{who}_{what}": word for what, word in _person(name).items()}
    for role, words in (("thing", "object"), ("stuff", "material"), ("pet", "animal"), ("gift", "food")):
        roles[role] = draws.pick(_WORDS[words])
    roles["look"] = draws.pick(lexicon.ADJECTIVES)
    roles["mood"] = draws.pick(lexicon.FEELINGS)
    return _Cast(draws, roles)


@cache
def _person(name: str) -> dict[str, str]:
    draws = Draws(f"person {name}")
    return {role: draws.pick(_WORDS[role]) for role in ("job", "town", "food", "animal")}


@cache
def _world() -> tuple[str, ...]:
    draws = Draws("world")
    people = [(name, _person(name)) for name in lexicon.NAMES]
    sentences = [f"{name} is a {person['job']}." for name, person in people]
    sentences += [f"{name} lives in {person['town']}." for name, person in people]
    sentences += [f"{name} likes {person['food']} and has a {person['animal']}." for name, person in people]
    sentences += [f"The {animal} eats {draws.pick(lexicon.FOODS)}." for animal in lexicon.ANIMALS]
    sentences += [
        f"{town} is known for its {draws.pick(lexicon.PLACES)} and its {draws.pick(lexicon.FOODS)}."
        for town in lexicon.TOWNS
    ]
    sentences += [f"A {thing} is made of {draws.pick(lexicon.MATERIALS)}." for thing in lexicon.OBJECTS]
    return tuple(with_articles(sentence) for sentence in sentences)
