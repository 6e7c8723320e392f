"""Finished parts of a comparison, kept in its output folder: the same command goes on from them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from artifacts.artifact import Artifact, load, save
from artifacts.errors import ArtifactError
from artifacts.manifest import tool_version
from calib.recipe.recipe import Recipe
from calib.statistics.model_statistics import ModelStatistics
from kvgauge.sweeping.cell import digest, digest_name, read_cell, stamp, write_cell
from kvgauge.sweeping.gathering import CALIBRATING, Gathering
from kvgauge.sweeping.settings import Settings
from kvgauge.terminal.console import bar, say
from kvgauge.terminal.interrupt import between_items
from simquant.evaluation.window_log import WindowLog


@dataclass(frozen=True)
class KeptComparison:
    """A folder for one model and its calibration; recipes, scored texts and protocols may come and go.

    Parameters
    ----------
    folder : Path
        Made where it does not exist.
    scoring : str
        Stands for all that scores and errors depend on besides, in the names of their files.
    """

    folder: Path
    scoring: str

    @classmethod
    def under(cls, output: Path, model: str, settings: Settings) -> "KeptComparison":
        """The folder of a model and settings; says on standard error if an earlier run left something there."""
        every, calibrated = settings.model_dump(mode="json"), settings.calibration_source(model)
        # Everything that a figure depends on, the version of the tool included: another release may fit other numbers.
        identity = {
            "model": model,
            "calibration_dataset": calibrated,
            "settings": {name: every[name] for name in (*CALIBRATING, "statistics")},
            "sources": {name: stamp(name) for name in (model, calibrated)},
            "tool_version": tool_version(),
        }
        scoring = {"settings": every, "source": stamp(settings.evaluation(model).text.source)}
        kept = output / "kept"
        folder = kept / digest(identity)[:12]
        if folder.exists():
            say(f"{folder}: going on from what an earlier run has finished")
        elif kept.exists():
            say(f"{kept}: was made with other settings, texts or versions; this comparison starts from the beginning")
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, digest(scoring)[:12])

    def statistics(self, source: Gathering) -> ModelStatistics:
        """Statistics, kept or gathered now; Ctrl-C waits for the window at hand and keeps it."""
        path = source.path(self.folder)
        is_new = not path.exists() and not source.unfinished(self.folder).exists()
        started = time.perf_counter()
        found = source.kept(self.folder, lambda windows: between_items(bar(windows, f"calibrating, {source.stage}")))
        if is_new:
            write_cell(path.with_suffix(".json"), {}, {"gather_seconds": time.perf_counter() - started})
        return found

    def gather_seconds(self, source: Gathering) -> float | None:
        """Wall time of gathering; None where it was interrupted, or is still to be done."""
        taken = read_cell(source.path(self.folder).with_suffix(".json"))
        return None if taken is None else float(taken["gather_seconds"])

    def fitted(self, recipe: Recipe) -> tuple[Artifact, float] | None:
        """The artifact fitted for a recipe and the seconds it took; None where that is still to be done."""
        path = self._path(recipe)
        if not path.exists():
            return None
        taken = read_cell(path.with_suffix(".json"))
        try:
            return None if taken is None else (load(path), float(taken["fit_seconds"]))
        except ArtifactError as error:
            say(f"{error}; it is fitted again")
            return None

    def keep_fitted(self, recipe: Recipe, artifact: Artifact, seconds: float) -> None:
        """Keeps what was fitted."""
        save(artifact, self._path(recipe))
        write_cell(self._path(recipe).with_suffix(".json"), recipe.model_dump(mode="json"), {"fit_seconds": seconds})

    def errors_log(self, recipe: Recipe) -> WindowLog:
        """For the errors of single layers, window by window."""
        return WindowLog(self._path(recipe).with_suffix(f".errors-{self.scoring}.jsonl"))

    def scores_log(self, recipes: Sequence[Recipe]) -> WindowLog:
        """For the scores of recipes that share their full-precision passes, batch by batch."""
        names = digest([self._path(recipe).name for recipe in recipes])[:12]
        return WindowLog(self.folder / f"scores-{self.scoring}-{names}.jsonl")

    def _path(self, recipe: Recipe) -> Path:
        identity = recipe.model_dump(mode="json")
        return self.folder / f"{digest_name(identity, recipe.name)}.safetensors"
