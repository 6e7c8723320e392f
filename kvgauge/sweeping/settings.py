"""Settings of calibration and evaluation that all cells of a sweep share."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from artifacts.errors import InvalidValueError
from calib.statistics.site_statistics import Tier
from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.fields import filled
from kvgauge.configuration.gather import NSAMPLES
from kvgauge.configuration.model import Dtype
from kvgauge.configuration.protocol import OF_STEPS
from simquant.protocols.protocol import ProtocolName
from simquant.tasks.item import Format


class Settings(BaseModel):
    """The options of `calibrate` and `evaluate`, by their names, for all cells alike.

    Parameters
    ----------
    dataset, calibration_dataset : str or None
        Text to evaluate and to calibrate on; None as for the options: `demo` for the demo model, else `wikitext2`; and
        what is evaluated on.
    field : str
        Of .jsonl files.
    nsamples, limit : int
        Windows for calibration, and for evaluation at most (None: all).
    seqlen : int or None
        Tokens of a window.
    bos : bool
        Whether every window begins with the tokenizer's start token.
    seed : int
        Draws the calibration windows, and what a search tries.
    statistics : {'basic', 'full'}
        What is gathered.
    batch_size : int
        Windows per forward pass.
    protocol, residual_tokens, block_tokens, residual_length, keep_smallest_norm, exact_prefill : str, int, bool
        How the quantized cache is run; what is None is as the recipe says.
    prefill_tokens, chunk_tokens : int or None
        In which steps.
    task_limit, task_data, task_prompts, task_lengths, task_depths, task_format : int, Path, tuple, str
        The items of tasks.
    device, dtype, maxseqlen
        How models are loaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str | None = None
    calibration_dataset: str | None = None
    field: str = "text"
    nsamples: int = Field(default=NSAMPLES, ge=1)
    limit: int | None = Field(default=None, ge=1)
    seqlen: int | None = Field(default=None, ge=2)
    bos: bool = False
    seed: int = 0
    statistics: Tier = "basic"
    batch_size: int = Field(default=1, ge=1)
    protocol: ProtocolName = "full"
    residual_tokens: int | None = Field(default=None, ge=1)
    block_tokens: int | None = Field(default=None, ge=1)
    residual_length: int | None = Field(default=None, ge=1)
    keep_smallest_norm: int | None = Field(default=None, ge=0)
    exact_prefill: bool | None = None
    prefill_tokens: int | None = Field(default=None, ge=1)
    chunk_tokens: int | None = Field(default=None, ge=1)
    task_limit: int | None = Field(default=None, ge=1)
    task_data: Path | None = None
    task_prompts: Path | None = None
    task_lengths: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    task_depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(default=None, min_length=1)
    task_format: Format | None = None
    device: str | None = None
    dtype: Dtype = "auto"
    maxseqlen: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> "Settings":
        given = [name for name in OF_STEPS if getattr(self, name) is not None]
        if self.protocol == "full" and given:
            raise InvalidValueError(f"{', '.join(given)}: no effect with protocol: full; use protocol: decode or cache")
        return self

    def evaluation(self, model: str) -> EvaluateConfig:
        """The same as if it had been typed for this model."""
        own = {name: getattr(self, name) for name in Settings.model_fields}
        return filled(EvaluateConfig, {**own, "model": model}).of_model(model)

    def calibration_source(self, model: str) -> str:
        """Text to calibrate this model on."""
        return self.calibration_dataset or self.evaluation(model).text.source
