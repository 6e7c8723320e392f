"""Samplers: the choice of the next setting to try."""

import importlib
import importlib.util
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvgauge.sweeping.search.space import Parameter
from kvgauge.terminal.console import UsageError

Values = dict[str, Any]

_TRIES = 100
"""Draws in a row of what was drawn before, after which there is taken to be nothing else."""

_OVER_BUDGET = 1e6
"""Added to the bits beyond the budget: worse than any objective. The estimator ranks values, and reads no sizes."""


@dataclass(frozen=True)
class Score:
    """Score of a setting: the objective, less being better, and the bits beyond the budget."""

    objective: float
    excess_bits: float


class Sampler(Protocol):
    """Proposes values, and hears what they gave."""

    def ask(self, n: int) -> list[Values]:
        """Values for all parameters to try next, at most `n` of them; none when there are no more."""

    def tell(self, scores: Sequence[Score | None]) -> None:
        """Takes the scores of the settings proposed last; None for one that failed."""


@dataclass
class RandomSampler:
    """Draws evenly, nothing twice, and learns nothing; a longer search begins with the trials of a shorter one.

    Parameters
    ----------
    parameters : mapping from str to Parameter
        What may be changed.
    seed : int
        Same seed, same trials.
    """

    parameters: Mapping[str, Parameter]
    seed: int
    _seen: list[Values] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def ask(self, n: int) -> list[Values]:
        """See `Sampler`."""
        # Rejection: what was drawn before is drawn again. Many vain draws in a row mean that few settings are left.
        start, tries = len(self._seen), 0
        while len(self._seen) < start + n and tries < _TRIES:
            values = {name: parameter.drawn(self._random) for name, parameter in self.parameters.items()}
            if values in self._seen:
                tries += 1
            else:
                self._seen.append(values)
                tries = 0
        return self._seen[start:]

    def tell(self, scores: Sequence[Score | None]) -> None:
        """See `Sampler`."""


class OptunaSampler:
    """Optuna's tree-structured Parzen estimator; what is over the budget ranks behind everything within.

    The same trials come again where as many are tried at a time.

    Parameters
    ----------
    parameters : mapping from str to Parameter
        What may be changed.
    seed : int
        Of the estimator.
    at_once : int
        Values to propose before hearing of any.

    Raises
    ------
    UsageError
        If optuna is not installed.
    """

    def __init__(self, parameters: Mapping[str, Parameter], seed: int, at_once: int) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise UsageError("--sampler optuna: the package optuna is not installed; type pip install optuna")
        optuna = importlib.import_module("optuna")  # has no types where it is not installed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self._failed = optuna.trial.TrialState.FAIL
        self._parameters, self._at_once = parameters, at_once
        self._open: list[Any] = []

    def ask(self, n: int) -> list[Values]:
        """See `Sampler`."""
        self._open = [self._study.ask() for _ in range(min(n, self._at_once))]
        return [{name: _suggested(trial, name, own) for name, own in self._parameters.items()} for trial in self._open]

    def tell(self, scores: Sequence[Score | None]) -> None:
        """See `Sampler`."""
        for trial, score in zip(self._open, scores, strict=True):
            if score is None:
                self._study.tell(trial, state=self._failed)
            else:
                over = score.excess_bits > 0
                self._study.tell(trial, _OVER_BUDGET + score.excess_bits if over else score.objective)


def _suggested(trial: Any, name: str, parameter: Parameter) -> Any:
    if parameter.choices is not None:  # by number: most lists are in an order that means something
        return parameter.choices[trial.suggest_int(name, 0, len(parameter.choices) - 1)]
    suggest = trial.suggest_int if parameter.whole else trial.suggest_float
    return parameter.rounded(suggest(name, parameter.low, parameter.high, log=parameter.log))
