"""The report of an evaluation."""

from dataclasses import dataclass
from pathlib import Path

REPORT_WINDOWS = 8
"""Windows behind the figures of single layers, unless another number is asked for."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A report to write, and what it shows.

    Parameters
    ----------
    report : Path or None
        Folder for report.html and report.json; None is no report.
    report_compare : Path or None
        results.json of `kvgauge compare`, shown beside this run.
    report_windows : int or None
        Windows behind the figures of single layers.
    """

    report: Path | None = None
    report_compare: Path | None = None
    report_windows: int | None = None
