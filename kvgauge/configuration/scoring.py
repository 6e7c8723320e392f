"""The windows that are scored, and the figures beside the losses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Windows to evaluate, targets that count, and figures of single sites.

    Parameters
    ----------
    limit : int or None
        Windows at most; None is all.
    batch_size : int
        Windows per forward pass.
    normalization : {'targets', 'gptq'}
        Perplexity over all targets, or over the means of windows.
    stride : int or None
        Tokens from one window to the next, of which each scores its last; None is windows side by side.
    resume : Path or None
        Log of finished windows.
    site_losses : int or None
        Windows on which each site is also quantized alone.
    clipping : bool
        Values beyond the fitted ranges are counted.
    """

    limit: int | None = None
    batch_size: int = 1
    normalization: Literal["targets", "gptq"] = "targets"
    stride: int | None = None
    resume: Path | None = None
    site_losses: int | None = None
    clipping: bool = False
