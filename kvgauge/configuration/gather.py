"""The statistics of a calibration: taken from a model now, or read from files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvgauge.configuration.fields import flag
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from calib.statistics.site_statistics import Tier

NSAMPLES = 16
"""Calibration windows, unless another number is asked for."""


@dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """Statistics to gather, or files that hold them.

    Parameters
    ----------
    nsamples : int or None
        Calibration windows; None where no number was given.
    statistics : {'basic', 'full'}
        Least that is gathered; more where the recipe reads more.
    fisher : bool
        Squared gradients too.
    shard : tuple of int or None
        Number of a shard, from 1, and how many there are: every N-th window, from the I-th.
    save_statistics : Path or None
        File to keep them in.
    from_statistics : Path or None
        File to read instead of running the model.
    merge : list of Path or None
        Files of several shards to read instead.
    resume : Path or None
        File of an interrupted run to go on from.

    Raises
    ------
    UsageError
        If several sources are named.
    """

    nsamples: int | None = None
    statistics: "Tier" = "basic"
    fisher: bool = False
    shard: tuple[int, int] | None = None
    save_statistics: Path | None = None
    from_statistics: Path | None = None
    merge: list[Path] | None = None
    resume: Path | None = None

    def __post_init__(self) -> None:
        sources = [name for name in ("from_statistics", "merge", "resume") if getattr(self, name)]
        if len(sources) > 1:
            raise UsageError(f"{flag(sources[0])} and {flag(sources[1])} cannot be combined; keep one of them")

    @property
    def n_windows(self) -> int:
        """Calibration windows, all shards together."""
        return self.nsamples or NSAMPLES

    @property
    def files(self) -> tuple[Path, ...]:
        """Statistics to fit from without running the model; none where it is run."""
        return tuple(self.merge or ([self.from_statistics] if self.from_statistics else []))
