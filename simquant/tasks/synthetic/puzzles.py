"""Puzzles of synthetic tasks: needles to hide in a long text, question and answer; all wording is ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase
from typing import TypeVar, final

from simquant.tasks.synthetic.words import HIDING_PLACES, NAMES, THINGS, TOWNS

T = TypeVar("T")

_KEYS = 4
_VALUES = 3
_COPIES = 3
_DECOYS = 2


@final
@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """Question whose answer is hidden in a text.

    Parameters
    ----------
    opening : str
        Instruction before the text.
    needles : tuple of str
        Sentences to hide in the text, in their order.
    question : str
        Question after the text.
    beginning : str
        Beginning of the answer, for a model that goes on with text.
    references : tuple of str
        All parts of the answer.
    """

    opening: str
    needles: tuple[str, ...]
    question: str
    beginning: str
    references: tuple[str, ...]


def passkey(draw: Random) -> Puzzle:
    """Puzzle with a number of five digits."""
    key = str(_between(draw, 10_000, 99_999))
    return Puzzle(
        opening="Somewhere in the text below stands a pass key. Find it and remember it.",
        needles=(f"The pass key is {key}. Remember it: {key} is the pass key.",),
        question="What is the pass key?",
        beginning="The pass key is",
        references=(key,),
    )


def needle(draw: Random) -> Puzzle:
    """Puzzle with a place, told in one sentence."""
    (name,), (thing,), (town,), (place,) = (sample(draw, words, 1) for words in (NAMES, THINGS, TOWNS, HIDING_PLACES))
    return Puzzle(
        opening="Read the text below; a question about one of its sentences follows.",
        needles=(f"The {thing} that {name} brought from {town} is hidden in the {place}.",),
        question=f"Where is the {thing} that {name} brought from {town}?",
        beginning="It is hidden in the",
        references=(place,),
    )


def multi_key(draw: Random) -> Puzzle:
    """Puzzle with numbers of several things, one of which is asked."""
    things = sample(draw, THINGS, _KEYS)
    numbers = [str(_between(draw, 1000, 9999)) for _ in things]
    asked = _between(draw, 0, _KEYS - 1)
    return Puzzle(
        opening="The text below gives numbers to some things. Remember all of them.",
        needles=tuple(f"The number of the {thing} is {n}." for thing, n in zip(things, numbers, strict=True)),
        question=f"What is the number of the {things[asked]}?",
        beginning=f"The number of the {things[asked]} is",
        references=(numbers[asked],),
    )


def multi_value(draw: Random) -> Puzzle:
    """Puzzle with several numbers of two things; all numbers of one thing are asked."""
    asked, other = sample(draw, THINGS, 2)
    numbers = [str(_between(draw, 1000, 9999)) for _ in range(2 * _VALUES)]
    needles = [f"One of the numbers of the {(asked, other)[i % 2]} is {number}." for i, number in enumerate(numbers)]
    return Puzzle(
        opening="The text below gives several numbers to some things. Remember all of them.",
        needles=tuple(sample(draw, needles, len(needles))),
        question=f"Which {_VALUES} numbers does the {asked} have?",
        beginning=f"The numbers of the {asked} are",
        references=tuple(numbers[::2]),
    )


def variables(draw: Random) -> Puzzle:
    """Puzzle with a chain of variables, each set to the one before; all variables of its value are asked."""
    # A and I are left out, as they are English words. Decoys have values of their own, at random places of the text.
    letters = sample(draw, ascii_uppercase.replace("A", "").replace("I", ""), _COPIES + 1 + _DECOYS)
    names = [f"{letter}{_between(draw, 10, 99)}" for letter in letters]
    chain, decoys = names[: _COPIES + 1], names[_COPIES + 1 :]
    value, *others = sample(draw, range(10_000, 99_999), 1 + _DECOYS)
    told = [f"Variable {chain[0]} is set to {value}."]
    told += [f"Variable {new} is set to {old}." for old, new in pairwise(chain)]
    for name, number in zip(decoys, others, strict=True):
        told.insert(_between(draw, 0, len(told)), f"Variable {name} is set to {number}.")
    return Puzzle(
        opening="The text below sets variables, some of them to the value of another one. Keep track of them.",
        needles=tuple(told),
        question=f"Which {len(chain)} variables hold the value {value}?",
        beginning="They are",
        references=tuple(chain),
    )


def sample(draw: Random, items: Sequence[T], n: int) -> list[T]:
    """Random sample of n different items, in random order."""
    # Only random() is used: its sequence for a seed is the one that Python promises to keep from release to release.
    pool = list(items)
    for i in range(n):
        j = _between(draw, i, len(pool) - 1)
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:n]


def _between(draw: Random, low: int, high: int) -> int:
    return low + int(draw.random() * (high - low + 1))
