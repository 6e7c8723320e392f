"""All recipes on one model: calibrated on the same text, and measured on the same windows."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.model.attention import AttentionLayer
from calib.capture import site_shapes
from calib.fitting.fit import fit
from calib.recipe.layer_choice import check
from calib.recipe.recipe import Recipe
from calib.statistics.model_statistics import ModelStatistics
from kvgauge.comparing.compared_recipe import ComparedRecipe
from kvgauge.comparing.kept_comparison import KeptComparison
from kvgauge.sweeping.gathering import Gathering
from kvgauge.sweeping.settings import Settings
from kvgauge.terminal.console import UsageError, bar, say
from simquant.evaluate import evaluate_each
from simquant.evaluation.attention_inputs import AttentionInputs, attention_inputs
from simquant.evaluation.site_errors import AttentionErrors, attention_errors
from simquant.protocols.protocol import ProtocolName
from simquant.simulate import simulate

_TRIED = 64
"""Tokens of a pass that only shows whether a recipe runs."""


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
    kept : KeptComparison
        What an earlier run has finished, and where this one keeps what it finishes.
    skipped : dict from str to str
        Why a recipe is not compared, by its name.
    """

    model: nn.Module
    layers: Sequence[AttentionLayer]
    recipes: Sequence[Recipe]
    kept: KeptComparison
    skipped: dict[str, str] = field(default_factory=dict)
    _artifacts: dict[str, Artifact] = field(default_factory=dict)
    _fit_seconds: dict[str, float] = field(default_factory=dict)
    _errors: dict[str, dict[int, AttentionErrors]] = field(default_factory=dict)
    _gatherings: dict[str, Gathering] = field(default_factory=dict)

    def calibrate(self, model: str, settings: Settings) -> None:
        """Fits all recipes, from one pass over the windows for each stage of keys that they take.

        Parameters
        ----------
        model : str
            Folder, GGUF file, hub id, `demo` or another known name.
        settings : Settings
            Text, windows and tier of the statistics.
        """
        for recipe in self.recipes:
            with self._or_skipped(recipe.name):
                check(recipe, site_shapes(self.layers, recipe.stage))
        for stage in sorted({recipe.stage for recipe in self._left()}):
            own = [recipe for recipe in self._left() if recipe.stage == stage]
            fisher = any(recipe.needs_fisher for recipe in own)
            missing = [recipe for recipe in own if not self._recalled(recipe)]
            self._gatherings[stage] = Gathering(model, settings, stage, settings.statistics, fisher)
            if missing:
                statistics = self.kept.statistics(self._gatherings[stage])
            for recipe in missing:
                with self._or_skipped(recipe.name):
                    self._fit(statistics, recipe)

    def measure_layers(self, windows: Int64[Tensor, "windows tokens"]) -> None:
        """Adds what each recipe does to single layers."""
        logs = {recipe.name: self.kept.errors_log(recipe) for recipe in self._left()}
        found = {
            recipe.name: [_errors(line) for line in logs[recipe.name].start(recipe.model_dump(mode="json"))]
            for recipe in self._left()
        }
        for index, window in enumerate(bar(windows, "errors of layers")):
            missing = [recipe for recipe in self._left() if index >= len(found[recipe.name])]
            seen = attention_inputs(self.model, self.layers, window) if missing else []
            for recipe in missing:
                with self._or_skipped(recipe.name):
                    found[recipe.name].append(self._measured(seen, recipe))
                    logs[recipe.name].append(index, _to_json(found[recipe.name][-1]))
        for name, of_windows in found.items():
            self._errors[name] = _summed(of_windows[: len(windows)])

    @torch.no_grad()
    def pass_seconds(self, windows: Int64[Tensor, "windows tokens"]) -> float:
        """Mean wall time of a bare forward pass of one window, to compare others with."""
        device = next(self.model.parameters()).device
        started = time.perf_counter()
        for window in windows:
            self.model(input_ids=window[None].to(device), use_cache=False).logits[0, -1, -1].item()  # waits for a GPU
        return (time.perf_counter() - started) / len(windows)

    def gather_seconds(self) -> dict[str, float | None]:
        """Wall time of gathering by stage of keys; None where it was interrupted."""
        return {stage: self.kept.gather_seconds(source) for stage, source in self._gatherings.items()}

    def evaluate(
        self, windows: Int64[Tensor, "windows tokens"], batch_size: int, protocol: ProtocolName
    ) -> list[ComparedRecipe]:
        """Measures the bits and the losses of each recipe, with the tokens in full precision that it asks for.

        Raises
        ------
        UsageError
            If no recipe goes with the model.
        """
        self._try(windows[:1, :_TRIED])
        names = [recipe.name for recipe in self._left()]
        if not names:
            reasons = "\n  ".join(self.skipped.values())
            raise UsageError(f"none of the recipes fits this model: {reasons}\nName others with --recipes")
        results = evaluate_each(
            self.model,
            windows,
            [self._artifacts[name] for name in names],
            protocol=protocol,
            batch_size=batch_size,
            progress=lambda batches: bar(batches, "evaluating"),
            log=self.kept.scores_log(self._left()),
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

    @torch.no_grad()
    def _try(self, window: Int64[Tensor, "1 tokens"]) -> None:
        """Skips recipes that the model cannot be run with, before hours of scoring others."""
        for recipe in self._left():
            with self._or_skipped(recipe.name), simulate(self.model, self._artifacts[recipe.name], layers=self.layers):
                self.model(input_ids=window.to(next(self.model.parameters()).device), use_cache=False)

    def _left(self) -> list[Recipe]:
        return [recipe for recipe in self.recipes if recipe.name not in self.skipped]

    @contextmanager
    def _or_skipped(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # what recipes, quantizers and statistics refuse
            self.skipped[name] = str(error)
            say(f"skipped: {error}")

    def _recalled(self, recipe: Recipe) -> bool:
        found = self.kept.fitted(recipe)
        if found is not None:
            self._artifacts[recipe.name], self._fit_seconds[recipe.name] = found
        return found is not None

    def _fit(self, statistics: ModelStatistics, recipe: Recipe) -> None:
        start = time.perf_counter()
        artifact = fit(statistics, recipe, progress=partial(bar, what=f"fitting {recipe.name}"))
        seconds = time.perf_counter() - start
        self.kept.keep_fitted(recipe, artifact, seconds)
        self._artifacts[recipe.name], self._fit_seconds[recipe.name] = artifact, seconds

    def _measured(self, seen: Sequence[AttentionInputs], recipe: Recipe) -> dict[int, AttentionErrors]:
        artifact = self._artifacts[recipe.name]
        sinks = artifact.manifest.sink_tokens
        return {inputs.layer.layer: attention_errors(inputs, artifact, sink_tokens=sinks) for inputs in seen}


def _summed(windows: Sequence[dict[int, AttentionErrors]]) -> dict[int, AttentionErrors]:
    layers = windows[0] if windows else {}
    return {layer: sum((found[layer] for found in windows), start=AttentionErrors()) for layer in layers}


def _to_json(errors: dict[int, AttentionErrors]) -> dict[str, dict[str, str]]:
    """By layer; every bit of the numbers, also where they are not finite."""
    # Hexadecimal floats keep every bit: a comparison that is gone on with prints the table of one that was not stopped.
    return {str(layer): {name: x.hex() for name, x in asdict(own).items()} for layer, own in errors.items()}


def _errors(data: dict[str, dict[str, str]]) -> dict[int, AttentionErrors]:
    return {
        int(layer): AttentionErrors(**{name: float.fromhex(x) for name, x in own.items()})
        for layer, own in data.items()
    }
