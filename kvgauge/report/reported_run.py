"""An evaluation that has ended, as its report needs it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jaxtyping import Int64
from torch import Tensor

from artifacts.artifact import Artifact
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from calib.text.windows import split_windows
from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.report import REPORT_WINDOWS
from kvgauge.loading.models import LoadedModel
from kvgauge.running.calibration_text import calibration_windows
from kvgauge.running.evaluated import Evaluated

_BESIDE_TEXT = ("tasks", "lm_eval")


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """An evaluation that has ended, with what it ran on.

    Parameters
    ----------
    loaded : LoadedModel
        Model and tokenizer.
    quantizers : Artifact or mapping from Site to Quantizer
        Of the cache.
    settings : mapping
        Policy, protocol and chunking, as `simquant.evaluate` takes them.
    windows : Int64[Tensor, "windows tokens"]
        Some of the first evaluation text, for errors and pictures.
    calibration_windows : Int64[Tensor, "windows tokens"] or None
        Some of the calibration text, where it is at hand.
    results : mapping
        `EvalResult.to_json` by text; empty where only tasks were run.
    tasks : mapping
        `TaskResult.to_json` by task.
    lm_eval : mapping or None
        What `run_lm_eval` found.
    model, command : str
        As they were typed.
    compared : Path or None
        results.json of `kvgauge compare`.
    """

    loaded: LoadedModel
    quantizers: Artifact | Mapping[Site, Quantizer]
    settings: Mapping[str, Any]
    windows: Int64[Tensor, "windows tokens"]
    calibration_windows: Int64[Tensor, "windows tokens"] | None = None
    results: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    lm_eval: Mapping[str, Any] | None = None
    model: str
    command: str
    compared: Path | None = None

    @classmethod
    def of(
        cls,
        config: EvaluateConfig,
        argv: Sequence[str],
        loaded: LoadedModel,
        evaluated: Evaluated,
        found: Mapping[str, Any],
    ) -> Self:
        """The run that `evaluate` has at its end; the text is read again for a few windows.

        Parameters
        ----------
        config : EvaluateConfig
            What was asked for.
        argv : sequence of str
            The command line as it came.
        loaded : LoadedModel
            Model and tokenizer.
        evaluated : Evaluated
            What was evaluated.
        found : mapping
            What `evaluate --json` prints.
        """
        dataset = config.text.datasets[0]
        text = loaded.corpus(dataset, "evaluation", config.text.field)
        seqlen, start_token = loaded.window_tokens(config.text.seqlen), loaded.start_token(config.text.bos)
        # No more than were evaluated: pictures and figures then come from the same windows.
        wanted = config.report.report_windows or REPORT_WINDOWS
        limit = min(wanted, config.scoring.limit or wanted)
        artifact = evaluated.artifact
        single = {dataset: {name: value for name, value in found.items() if name not in _BESIDE_TEXT}}
        return cls(
            loaded=loaded,
            quantizers=evaluated.quantizers,
            settings=evaluated.settings(config),
            windows=split_windows(text, seqlen=seqlen, limit=limit, start_token=start_token),
            calibration_windows=None if artifact is None else calibration_windows(config.text, loaded, artifact),
            results=found.get("datasets") or (single if "loss_nats" in found else {}),
            tasks=found.get("tasks", {}),
            lm_eval=found.get("lm_eval"),
            model=config.model.name,
            command=shlex.join(["evaluate", *argv]),
            compared=config.report.report_compare,
        )
