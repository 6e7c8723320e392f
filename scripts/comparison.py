"""All recipes on one model: calibrated on the same text, and measured on the same windows."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.attention import AttentionLayer
from calib.calibration import add_windows, new_statistics
from calib.capture import site_shapes
from calib.fitting import fit
from calib.layer_choice import check
from calib.recipe import Recipe
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_statistics import Tier
from scripts.compared_recipe import ComparedRecipe
from scripts.console import UsageError, bar, say
from simquant.evaluate import evaluate_each
from simquant.evaluation.attention_inputs import AttentionInputs, attention_inputs
from simquant.evaluation.site_errors import AttentionErrors, attention_errors


@dataclass
class Comparison:
    """Recipes on their way from text to figures; one that does not go with the model is skipped, with the reason.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    layers : Sequence[AttentionLayer]
        Its attention layers.
    recipes : Sequence[Recipe]
        With different names.
    skipped : dict from str to str
        Why a recipe is not compared, by its name.
    """

    model: nn.Module
    layers: Sequence[AttentionLayer]
    recipes: Sequence[Recipe]
    skipped: dict[str, str] = field(default_factory=dict)
    _artifacts: dict[str, Artifact] = field(default_factory=dict)
    _fit_seconds: dict[str, float] = field(default_factory=dict)
    _errors: dict[str, dict[int, AttentionErrors]] = field(default_factory=dict)

    def calibrate(self, windows: Int64[Tensor, "windows tokens"], tier: Tier, **origin: Any) -> None:
        """Fits all recipes, from one pass over the windows for each stage of keys that they take.

        Parameters
        ----------
        windows : Int64[Tensor, "windows tokens"]
            Token ids of the calibration text, without padding.
        tier : {'basic', 'full'}
            Which statistics to take.
        **origin
            See `calib.calibration.new_statistics`.
        """
        for recipe in self.recipes:
            with self._or_skipped(recipe.name):
                check(recipe, site_shapes(self.layers, recipe.stage))
        for stage in sorted({recipe.stage for recipe in self._left()}):
            own = [recipe for recipe in self._left() if recipe.stage == stage]
            gradients = {"fisher": True} if any(recipe.needs_fisher for recipe in own) else {}
            statistics = new_statistics(self.model, self.layers, stage=stage, tier=tier, **gradients, **origin)
            add_windows(self.model, self.layers, statistics, windows, lambda w, s=stage: bar(w, f"calibrating, {s}"))
            for recipe in own:
                with self._or_skipped(recipe.name):
                    self._fit(statistics, recipe)

    def measure_layers(self, windows: Int64[Tensor, "windows tokens"]) -> None:
        """Adds what each recipe does to single layers."""
        self._errors = {name: {layer.layer: AttentionErrors() for layer in self.layers} for name in self._artifacts}
        for window in bar(windows, "errors of layers"):
            seen = attention_inputs(self.model, self.layers, window)
            for recipe in self._left():
                with self._or_skipped(recipe.name):
                    self._measure(seen, recipe)

    def evaluate(self, windows: Int64[Tensor, "windows tokens"], batch_size: int) -> list[ComparedRecipe]:
        """What each recipe stores and loses.

        Raises
        ------
        UsageError
            If no recipe goes with the model.
        """
        names = [recipe.name for recipe in self._left()]
        if not names:
            reasons = "\n  ".join(self.skipped.values())
            raise UsageError(f"no recipe is left to compare: {reasons}\nName others with --recipes")
        results = evaluate_each(
            self.model,
            windows,
            [self._artifacts[name] for name in names],
            batch_size=batch_size,
            progress=lambda batches: bar(batches, "evaluating"),
        )
        return [
            ComparedRecipe(
                name=name,
                artifact=self._artifacts[name],
                fit_seconds=self._fit_seconds[name],
                errors=self._errors[name],
                result=result,
            )
            for name, result in zip(names, results, strict=True)
        ]

    def _left(self) -> list[Recipe]:
        return [recipe for recipe in self.recipes if recipe.name not in self.skipped]

    @contextmanager
    def _or_skipped(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # what recipes, quantizers and statistics refuse
            self.skipped[name] = str(error)
            say(f"skipped: {error}")

    def _fit(self, statistics: ModelStatistics, recipe: Recipe) -> None:
        start = time.perf_counter()
        self._artifacts[recipe.name] = fit(statistics, recipe)
        self._fit_seconds[recipe.name] = time.perf_counter() - start

    def _measure(self, seen: Sequence[AttentionInputs], recipe: Recipe) -> None:
        for inputs in seen:
            found = attention_errors(inputs, self._artifacts[recipe.name], sink_tokens=recipe.sink_tokens)
            self._errors[recipe.name][inputs.layer.layer] += found
