"""An evaluation: all that `evaluate` is told."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from kvgauge.configuration.harness import HarnessConfig
from kvgauge.configuration.model import ModelConfig
from kvgauge.configuration.protocol import ProtocolConfig
from kvgauge.configuration.recipe import RecipeConfig
from kvgauge.configuration.report import ReportConfig
from kvgauge.configuration.scoring import ScoringConfig
from kvgauge.configuration.tasks import TaskConfig
from kvgauge.configuration.text import TextConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """A model, a text, quantizers, and what is measured.

    Parameters
    ----------
    model, text, recipe, protocol, scoring, tasks, harness, report
        See the configurations of these names.
    quantizer_path : Path or None
        File of an artifact; None is dynamic scales by the recipe.
    json : bool
        Print one JSON object instead of tables.
    verbose : bool
        Log what happens.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    quantizer_path: Path | None = None
    json: bool = False
    verbose: bool = False

    def of_model(self, name: str | None) -> "EvaluateConfig":
        """The same with a model where none was named, and with the text that goes with the model."""
        model = replace(self.model, model=self.model.model or name)
        return replace(self, model=model, text=self.text.beside(model))
