"""Result of a task."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

from simquant.evaluation.figures import error_text
from simquant.tasks.item import Format


@final
@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Scores of a task, full precision against quantized on the same items.

    Parameters
    ----------
    task, metric : str
        Name of the task, and of its score from 0 to 1.
    format : {'plain', 'chat'}
        Form of the prompts.
    n : int
        Items that both models answered.
    fp, quantized : float
        Mean scores.
    fp_stderr, quantized_stderr : float
        Standard errors of the means over items (nan for a single item).
    difference, difference_stderr : float
        Mean difference of scores, quantized less full precision, and its standard error, paired by item and so smaller
        than the two above suggest.
    cells : tuple of mapping
        Cells of a table of items: coordinates, and `n`, `fp` and `quantized` of each cell.
    others : mapping
        Further means by name: `{"fp": ..., "quantized": ...}`.
    quantized_fraction : float or None
        Share of the cached tokens that were quantized; None if no quantizer has fewer than 16 bits.
    protocol : str
        Line that describes the quantized model, its cache and the decoding.
    """

    task: str
    metric: str
    format: Format
    n: int
    fp: float
    fp_stderr: float
    quantized: float
    quantized_stderr: float
    difference: float
    difference_stderr: float
    cells: tuple[Mapping[str, Any], ...] = ()
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quantized_fraction: float | None
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """JSON values; the undefined standard error of a single item becomes null."""
        plain = {**asdict(self), "cells": [dict(cell) for cell in self.cells]}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    def table(self) -> str:
        """Table as text, with a row for each cell."""
        rows = [
            ("full precision", f"{self.fp:.3f}, standard error {error_text(self.fp_stderr, '.3f')}"),
            ("quantized", f"{self.quantized:.3f}, standard error {error_text(self.quantized_stderr, '.3f')}"),
            ("difference", f"{self.difference:+.3f}, standard error {error_text(self.difference_stderr, '.3f')}"),
            *((name, f"{both['fp']:.3f} -> {both['quantized']:.3f}") for name, both in self.others.items()),
            *((_where(cell), f"{cell['fp']:.3f} -> {cell['quantized']:.3f}, n = {cell['n']}") for cell in self.cells),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name.rjust(width)}: {value}" for name, value in rows]
        asked = "" if self.format == "plain" else ", asked by chat template"
        return "\n".join([f"{self.task}, {self.metric}{asked}, n = {self.n}", *lines])


def _where(cell: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in cell.items() if name not in ("n", "fp", "quantized"))
