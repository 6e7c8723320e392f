"""Search space: the entries of a recipe that may change, and the objective."""

import math
import random
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from artifacts.errors import InvalidValueError
from calib.recipe.recipe import Recipe, load_recipe
from kvgauge.sweeping.recipe_edits import edited

Objective = Literal["loss_nats", "kl_mean", "kl_p999"]


class Parameter(BaseModel):
    """The values that one entry of a recipe may take.

    Parameters
    ----------
    choices : list or None
        All of them; or else
    low, high : int or float
        The ends of a range, which belong to it; whole numbers are drawn where both are whole, else numbers of four
        digits.
    log : bool
        Whether the logarithm is drawn evenly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: list[Any] | None = Field(default=None, min_length=1)
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "Parameter":
        if self.choices is not None:
            if self.low is not None or self.high is not None:
                raise InvalidValueError("expected a list of values, such as [2, 3, 4], or low and high; got both")
            return self
        if self.low is None or self.high is None:
            raise InvalidValueError(
                "expected a list of values, such as [2, 3, 4], or a range: {low: 0.001, high: 0.02}"
            )
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise InvalidValueError(f"low must be below high; got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise InvalidValueError(f"log: true needs low above 0; got {self.low}")
        return self

    @property
    def whole(self) -> bool:
        """True where only whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> list[Any]:
        """Values between which, or among which, all others are."""
        return self.choices if self.choices is not None else [self.low, self.high]

    def drawn(self, rng: random.Random) -> Any:
        """One value, at random."""
        if self.choices is not None:
            return rng.choice(self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.log:
            # Uniform in the logarithm: as many draws from 0.001 to 0.01 as from 0.01 to 0.1.
            return self.rounded(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return (
            rng.randint(int(self.low), int(self.high)) if self.whole else self.rounded(rng.uniform(self.low, self.high))
        )

    def rounded(self, value: float) -> int | float:
        """A value of the range as it stands in recipes and names."""
        if self.whole:
            return round(value)
        assert self.low is not None
        assert self.high is not None
        # Four digits, as names and .yaml files show them: the recipe that is tried is the one that they tell. Rounding
        # may pass the ends of the range, which hold.
        return min(max(float(f"{value:.4g}"), self.low), self.high)


class Search(BaseModel):
    """A search for the least objective within a bit budget.

    Parameters
    ----------
    recipe : str
        That is changed: a shipped one, or a file.
    parameters : mapping from str to Parameter
        By the dotted names of the recipe's entries.
    budget_bits : float
        Most bits per element that may be counted, the mean of keys and values, exact tokens included.
    objective : {'loss_nats', 'kl_mean', 'kl_p999'}
        A figure of `evaluate`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    parameters: dict[str, Parameter] = Field(min_length=1)
    budget_bits: float = Field(gt=0, allow_inf_nan=False)
    objective: Objective = "loss_nats"

    @model_validator(mode="after")
    def _possible(self) -> "Search":
        for name, parameter in self.parameters.items():
            for value in parameter.ends:
                edited(self.base, {name: value})
        return self

    @property
    def base(self) -> Recipe:
        """The recipe as it is."""
        return load_recipe(self.recipe)

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with a value for each parameter."""
        return edited(self.base, values)
