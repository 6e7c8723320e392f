"""Needle-in-a-haystack tasks: an answer hidden in filler text of a given length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import final

from simquant.tasks.item import Item
from simquant.tasks.options import TaskOptions
from simquant.tasks.prediction import Prediction
from simquant.tasks.synthetic.grid import DEPTHS, Place, places
from simquant.tasks.synthetic.lengths import lengths_of, longest_fit
from simquant.tasks.synthetic.puzzles import Puzzle
from simquant.tasks.synthetic.wording import answer_limits, worded
from simquant.tasks.synthetic.words import FILLER
from simquant.tasks.task import Task


@final
@dataclass(frozen=True, kw_only=True)
class Haystack(Task):
    """Puzzles hidden among filler sentences.

    A single needle is placed at the depths of the options; several needles are placed at random, in their order.

    Parameters
    ----------
    name, metric : str
        See `Task`.
    draw : callable
        Function that draws a puzzle from a random generator.
    compare : callable
        Score of an answer against the references.
    single : bool
        True if puzzles have one needle.
    max_new_tokens : int
        Maximum number of tokens of a plain answer, enough for tokenizers with a token per digit.

    References
    ----------
    arXiv 2305.16300 (passkey) and 2404.06654 (RULER), for the ideas; wording and sizes are ours.
    """

    name: str
    metric: str
    draw: Callable[[Random], Puzzle]
    compare: Callable[[str, Sequence[str]], float]
    single: bool = False
    max_new_tokens: int = 16

    def items(self, options: TaskOptions) -> Sequence[Item]:
        """Items, with a puzzle for each length and depth in turn."""
        lengths = lengths_of(self.name, options, answer_limits(self.max_new_tokens, options)[0])
        depths = (options.depths or DEPTHS) if self.single else (None,)
        return [self._item(options, place) for place in places(lengths, depths, options.limit or self.n_items)]

    def score(self, text: str, item: Item | Prediction) -> float:
        """Score of an answer by `compare`."""
        return self.compare(text, item.references)

    def _item(self, options: TaskOptions, place: Place) -> Item:
        seed = f"{self.name} {options.seed} {place.id}"
        draw = Random(seed)
        puzzle = self.draw(draw)
        depths = sorted(draw.random() for _ in puzzle.needles) if place.depth is None else [place.depth]
        write = partial(_prompt, puzzle, depths, seed, options)
        max_new_tokens, stop = answer_limits(self.max_new_tokens, options)
        return Item(
            task=self.name,
            id=place.id,
            prompt=longest_fit(write, place.length, options, self.name),
            references=puzzle.references,
            cell=place.cell("length"),
            max_new_tokens=max_new_tokens,
            stop=stop,
            format=options.format,
        )


def _prompt(puzzle: Puzzle, depths: Sequence[float], seed: str, options: TaskOptions, n_fillers: int) -> str:
    """Prompt with the needles among filler sentences; depth 0 is before all of them, depth 1 after."""
    draw = Random(f"fillers {seed}")
    sentences = [FILLER[int(draw.random() * len(FILLER))] for _ in range(n_fillers)]
    # Inserting the last needle first leaves the positions of the others valid.
    for needle, depth in reversed(list(zip(puzzle.needles, depths, strict=True))):
        sentences.insert(round(depth * n_fillers), needle)
    return worded(puzzle.opening, " ".join(sentences), puzzle.question, puzzle.beginning, options)
