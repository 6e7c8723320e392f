"""A calibration: all that `calibrate` is told."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from kvgauge.configuration.gather import GatherConfig
from kvgauge.configuration.model import ModelConfig
from kvgauge.configuration.recipe import RecipeConfig
from kvgauge.configuration.text import TextConfig


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """A model, a text, a recipe, and the files to write.

    Parameters
    ----------
    model, text, recipe, gather
        See the configurations of these names.
    quantizer_path : Path or None
        File for the artifact; None is one under runs/.
    force : bool
        Replace existing files.
    jobs : int or None
        Sites fitted at a time; None is the number of cores.
    print_recipe, list_recipes, list_sites : bool
        Print instead of calibrating.
    verbose : bool
        Log what happens.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    gather: GatherConfig = field(default_factory=GatherConfig)
    quantizer_path: Path | None = None
    force: bool = False
    jobs: int | None = None
    print_recipe: bool = False
    list_recipes: bool = False
    list_sites: bool = False
    verbose: bool = False

    def of_model(self) -> "CalibrateConfig":
        """The same with the demo model where none is named, and with the text that goes with the model."""
        model = replace(self.model, model=self.model.name)
        return replace(self, model=model, text=self.text.beside(model))
