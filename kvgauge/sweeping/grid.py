"""The file of a sweep: which recipes, on which models, for which tasks."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from artifacts.errors import InvalidValueError, KVGaugeError
from calib.recipe.errors import RecipeError, mark, recipe_error
from calib.recipe.recipe import Recipe, load_recipe
from calib.recipe.recipe_file import Document, parse_document
from kvgauge.configuration.tasks import TaskConfig, task_names
from kvgauge.sweeping.recipe_edits import edited
from kvgauge.sweeping.search.space import Search
from kvgauge.sweeping.settings import Settings
from kvgauge.terminal.console import UsageError


class GridError(KVGaugeError, ValueError):
    """A grid cannot be read, or asks for what is not there."""


class RecipeChoice(BaseModel):
    """A row of the grid: a recipe, perhaps with changes.

    Parameters
    ----------
    recipe : str
        A shipped one, or a file.
    set : mapping
        Changes by dotted names, such as `key.bits: 2`.
    name : str or None
        For tables; None is the recipe's, with the changes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    set: dict[str, Any] = {}
    name: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> "RecipeChoice":
        self.resolve()
        return self

    def resolve(self) -> Recipe:
        """The recipe."""
        return edited(load_recipe(self.recipe), self.set, self.name)


def _known_task(name: str) -> str:
    try:
        task_names(TaskConfig(tasks=name))
    except UsageError as error:
        raise InvalidValueError(str(error).removeprefix("--tasks: ")) from error
    return name


class Grid(Settings):
    """Cells of a sweep: every recipe on every model for every task.

    Parameters
    ----------
    models : list of str
        `demo` and other known names, folders, GGUF files, or hub ids.
    recipes : list of RecipeChoice
        In a file also the bare name of a recipe.
    tasks : list of str
        As `evaluate --tasks` names them, groups among them.
    search : Search or None
        What `--search` looks for.
    """

    models: list[str] = Field(default=["demo"], min_length=1)
    recipes: list[RecipeChoice] = Field(default=[])
    tasks: list[Annotated[str, AfterValidator(_known_task)]] = Field(default=["perplexity"], min_length=1)
    search: Search | None = None

    @property
    def single_tasks(self) -> tuple[str, ...]:
        """The tasks, each once, with groups resolved."""
        return task_names(TaskConfig(tasks=",".join(self.tasks), task_data=self.task_data))

    @property
    def settings(self) -> Settings:
        """The settings of every cell."""
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})

    @model_validator(mode="after")
    def _distinct(self) -> "Grid":
        recipes = [choice.resolve().name for choice in self.recipes]
        for what, names in (("models", self.models), ("recipes", recipes), ("tasks", self.tasks)):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise InvalidValueError(f"{what}: {twice[0]} is there twice; keep one, or give one its own name:")
        return self


def load_grid(path: Path) -> Grid:
    """The grid of a file.

    Raises
    ------
    GridError
        With file and line, what was expected, and the nearest known name.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GridError(f"grid {path}: cannot be read ({error.strerror}); expected a .yaml file") from error
    try:
        return _validated(parse_document(content, str(path)))
    except RecipeError as error:  # of the file itself: errors of recipes in it are inside
        raise GridError(re.sub("^recipe ", "grid ", str(error), flags=re.MULTILINE)) from error


def _validated(document: Document) -> Grid:
    if not isinstance(document.data, dict):
        place = mark((), document.where, document.marks)
        raise GridError(f"grid {place}: expected lines such as recipes: [kvquant-2, kvquant-3]")
    try:
        return Grid.model_validate_json(json.dumps(_spelt_out(document.data)), strict=True)
    except ValidationError as error:
        raise recipe_error(error, Grid, document.where, document.marks) from error


def _spelt_out(data: dict[str, Any]) -> dict[str, Any]:
    """Bare names of recipes, and bare lists of a parameter's values, as the entries that they stand for."""
    found = dict(data)
    if isinstance(data.get("recipes"), list):
        found["recipes"] = [{"recipe": row} if isinstance(row, str) else row for row in data["recipes"]]
    search = data.get("search")
    if isinstance(search, dict) and isinstance(search.get("parameters"), dict):
        rows = search["parameters"].items()
        values = {name: {"choices": row} if isinstance(row, list) else row for name, row in rows}
        found["search"] = {**search, "parameters": values}
    return found
