"""Statistics of a model for several recipes, from one pass over the calibration text, and a file that keeps them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from artifacts.errors import ArtifactError
from artifacts.manifest import tool_version
from artifacts.model.evidence import text_config
from artifacts.sites import Stage
from calib.calibration import add_windows, new_statistics
from calib.recipe.recipe import Recipe
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_statistics import Tier
from calib.text.corpus import Corpus, check_dataset
from calib.text.windows import check_vocabulary, sample_windows, split_windows
from calib.text.written import WrittenText
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import LoadedModel, load_model
from kvgauge.sweeping.cell import digest_name, stamp
from kvgauge.sweeping.settings import Settings
from kvgauge.terminal.console import say
from kvgauge.terminal.interrupt import remaining_windows
from simquant.evaluate import Progress

CALIBRATING = ("field", "nsamples", "seqlen", "bos", "seed", "device", "dtype", "maxseqlen")
"""Settings that statistics depend on, besides the text and what is gathered."""


@lru_cache(maxsize=1)
def loaded(config: ModelConfig) -> LoadedModel:
    """A model, loaded once as long as a process uses no other."""
    return load_model(config)


def held_out(model: str, settings: Settings) -> tuple[Corpus | WrittenText, Int64[Tensor, "windows tokens"]]:
    """The text to evaluate on, and its windows; a wrong name of a text is told before the model is loaded.

    Raises
    ------
    CorpusError
        If there is no such text, or it has no window, or token ids that the model does not know.
    """
    config = settings.evaluation(model)
    for source in (settings.calibration_source(model), config.text.source):
        check_dataset(source)
    found, text = loaded(config.model), config.text
    corpus = found.corpus(text.source, "evaluation", text.field)
    seqlen, start_token = found.window_tokens(text.seqlen), found.start_token(text.bos)
    windows = split_windows(corpus, seqlen=seqlen, limit=settings.limit, start_token=start_token)
    check_vocabulary(windows, text_config(found.model).vocab_size, corpus.name)
    return corpus, windows


@dataclass(frozen=True)
class Gathering:
    """Statistics of a model: their text, place, extent.

    Parameters
    ----------
    model : str
        Folder, GGUF file, hub id, `demo` or another known name.
    settings : Settings
        Those of calibration count.
    stage : {'pre_rope', 'post_rope'}
        Where keys are taken.
    tier : {'basic', 'full'}
        How much.
    fisher : bool
        Whether squared gradients are taken too.
    """

    model: str
    settings: Settings
    stage: Stage
    tier: Tier = "basic"
    fisher: bool = False

    @classmethod
    def serving(cls, model: str, settings: Settings, stage: Stage, recipes: Iterable[Recipe]) -> "Gathering":
        """Statistics that serve all those recipes that take keys at this stage, and at least what the settings say."""
        own = [recipe for recipe in recipes if recipe.stage == stage]
        tier: Tier = "full" if any(recipe.needs_full for recipe in own) else settings.statistics
        return cls(model, settings, stage, tier, any(recipe.needs_fisher for recipe in own))

    def gather(self, progress: Progress = iter, unfinished: Path | None = None) -> ModelStatistics:
        """Runs the model over the calibration windows, which `progress` wraps.

        After Ctrl-C the windows that are finished are kept in the file `unfinished`; the next call goes on from them.
        """
        own, found = self.settings, self.load_model()
        text = found.corpus(own.calibration_source(self.model), "calibration", own.field)
        seqlen, start_token = found.window_tokens(own.seqlen), found.start_token(own.bos)
        windows = sample_windows(text, n_windows=own.nsamples, seqlen=seqlen, seed=own.seed, start_token=start_token)
        layers = found.layers()
        statistics = new_statistics(
            found.model,
            layers,
            stage=self.stage,
            tier=self.tier,
            fisher=self.fisher,
            model_id=found.model_id,
            corpus=text.name,
            seed=own.seed,
            start_token=start_token,
            tokenizer_digest=found.tokenizer_digest,
        )
        if unfinished is not None and unfinished.exists():
            statistics.merge(ModelStatistics.load(unfinished))
            windows = remaining_windows(windows, statistics, unfinished)
        try:
            if len(windows):
                add_windows(found.model, layers, statistics, windows, progress)
        except KeyboardInterrupt:
            if unfinished is not None and statistics.windows and statistics.is_whole:
                statistics.save(unfinished)
            raise
        return statistics

    def load_model(self) -> LoadedModel:
        """The model."""
        return loaded(self.settings.evaluation(self.model).model)

    def path(self, folder: Path) -> Path:
        """File that `keep` writes."""
        return folder / f"{digest_name(self._identity(), self.model, self.stage)}.safetensors"

    def unfinished(self, folder: Path) -> Path:
        """File in which `kept` leaves the windows that were finished before Ctrl-C."""
        path = self.path(folder)
        return path.with_name(f"unfinished-{path.name}")

    def keep(self, folder: Path) -> None:
        """Gathers, and writes what was found into the folder."""
        self.gather().save(self.path(folder))

    def kept(self, folder: Path, progress: Progress) -> ModelStatistics:
        """Statistics from the folder, else gathered now and kept there; Ctrl-C loses the window at hand at most."""
        found = self._load(folder)
        if found is None:
            unfinished = self.unfinished(folder)
            found = self.gather(progress, unfinished)
            found.save(self.path(folder))
            unfinished.unlink(missing_ok=True)
        return found

    def is_kept(self, folder: Path) -> bool:
        """True if the folder holds these very statistics, undamaged."""
        return self._load(folder) is not None

    def _load(self, folder: Path) -> ModelStatistics | None:
        path = self.path(folder)
        if not path.exists():
            return None
        try:
            return ModelStatistics.load(path)
        except ArtifactError as error:
            say(f"{error}; the statistics are gathered again")
            return None

    def _identity(self) -> dict[str, Any]:
        source = self.settings.calibration_source(self.model)
        return {
            "model": self.model,
            "stage": self.stage,
            "tier": self.tier,
            "fisher": self.fisher,
            "calibration_dataset": source,
            **{name: getattr(self.settings, name) for name in CALIBRATING},
            "sources": [stamp(self.model), stamp(source)],
            "tool_version": tool_version(),
        }
