"""Scores of one batch of windows, in memory and as JSON."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.evaluation.scoring import Scores
from simquant.evaluation.window_log import WindowLog, WindowLogError
from simquant.usage import SiteUsage, Usage

_FLOATS = ("fp_nll", "nll", "kl")


@dataclass(frozen=True, eq=False)
class BatchScores:
    """Scores of a batch of windows under one set of quantizers.

    Parameters
    ----------
    scores : tuple of Scores
        Scores of each window.
    usage : Usage
        Counts of stored tokens and bytes.
    seconds : float
        Wall time, including the full-precision pass.
    """

    scores: tuple[Scores, ...]
    usage: Usage
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Lossless JSON values: arrays as base64 of their bytes."""
        return {
            "scores": [_scores_to_json(scores) for scores in self.scores],
            "usage": {str(site): asdict(use) for site, use in self.usage.sites.items()},
            "seconds": self.seconds,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], quantizers: Mapping[Site, Quantizer]) -> "BatchScores":
        """Scores from the JSON values of `to_json`.

        Raises
        ------
        KeyError, TypeError, AttributeError, ValueError
            If the values have another form.
        """
        usage = Usage(quantizers)
        usage.sites.update({Site.parse(site): SiteUsage(**counts) for site, counts in data["usage"].items()})
        return BatchScores(tuple(map(_scores_from_json, data["scores"])), usage, float(data["seconds"]))


def read_batches(
    log: WindowLog, settings: Mapping[str, Any], candidates: Sequence[Mapping[Site, Quantizer]]
) -> list[list[BatchScores]]:
    """Batches finished by earlier runs of the same evaluation, with the scores of each set of quantizers.

    Raises
    ------
    WindowLogError
        If the log belongs to another evaluation, or is damaged.
    """
    entries = log.start(settings)
    if len(entries) > len(settings["batch_sizes"]):
        raise WindowLogError(
            f"{log.path}: expected at most {len(settings['batch_sizes'])} batches; got {len(entries)}. Delete the file."
        )
    try:
        return [
            [BatchScores.from_json(data, own) for data, own in zip(entry, candidates, strict=True)] for entry in entries
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WindowLogError(
            f"{log.path}: expected batches of scores; got a batch of another form ({error!s:.100}). Delete the file."
        ) from error


def _scores_to_json(scores: Scores) -> dict[str, str]:
    # Little-endian float64 bytes in base64 keep every bit, so that a resumed evaluation gives the identical result.
    packed = {name: getattr(scores, name).numpy().astype("<f8") for name in _FLOATS}
    packed["agrees"] = scores.agrees.numpy().astype("u1")
    return {name: base64.b64encode(array.tobytes()).decode("ascii") for name, array in packed.items()}


def _scores_from_json(data: Mapping[str, str]) -> Scores:
    floats = {name: _unpacked(data[name], "<f8") for name in _FLOATS}
    agrees = _unpacked(data["agrees"], "u1").bool()
    if len({len(column) for column in (*floats.values(), agrees)}) != 1:
        raise InvalidValueError(
            "scores: expected as many targets in each column; got "
            + ", ".join(f"{name} {len(column)}" for name, column in {**floats, "agrees": agrees}.items())
        )
    return Scores(**floats, agrees=agrees)


def _unpacked(text: str, dtype: str) -> Tensor:
    array = np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
