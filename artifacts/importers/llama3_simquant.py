"""Importer of LLaMA3-simquant's pickle: KVQuant's format with numpy thresholds and levels in units of activations."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from artifacts.errors import CorruptArtifactError
from artifacts.importers import tables
from artifacts.importers.hints import Hints
from artifacts.importers.tables import Table
from artifacts.quantizer import Quantizer
from artifacts.quantizers.codebook import Codebook
from artifacts.quantizers.sparse import PercentileSparse, ThresholdSparse
from artifacts.sites import Site
from artifacts.storage import naming


def wrote(content: dict[Any, Any]) -> bool:
    """True for a file of LLaMA3-simquant: its thresholds are numpy vectors or None, those of KVQuant are tensors."""
    firsts = [entry[0] for entry in content.values() if isinstance(entry, tuple | list) and len(entry) >= 3]
    return bool(firsts) and all(first is None or isinstance(first, np.ndarray) for first in firsts)


def quantizers(path: Path, content: dict[Any, Any], hints: Hints) -> tuple[dict[Site, Quantizer], list[str]]:
    """Quantizers of the file, and notices of assumptions.

    Raises
    ------
    ArtifactError
        If an entry is damaged or empty, or a hint is missing or contradicts the file.
    """
    with naming(path):
        entries, notices = tables.by_site(content)
        channels = _channels(entries)
        found = {site: _quantizer(site, entry, channels, hints) for site, entry in sorted(entries.items())}
    notices.append("levels are used in units of the activations, as they were fitted, without a scale")
    notices.append("thresholds of values are those of calibration tokens and are left out")
    if hints.outlier_fraction is None:
        notices.append("the file does not record outliers: assumed none (--include-sparse)")
    return found, notices


def _channels(entries: dict[Site, Any]) -> int:
    for site, entry in entries.items():
        if site.tensor == "key" and isinstance(entry, tuple | list) and entry[0] is not None:
            return len(tables.numbers(site, "upper", entry[0]))
    raise CorruptArtifactError("expected keys with thresholds, to know the number of channels; got none in the file")


def _quantizer(site: Site, entry: Any, channels: int, hints: Hints) -> Quantizer:
    if not isinstance(entry, tuple | list) or len(entry) < 3:
        raise CorruptArtifactError(f"{site}: expected (upper, lower, levels); got {type(entry).__name__}")
    upper, lower, levels, *_ = entry
    if upper is None or lower is None:
        raise CorruptArtifactError(f"{site}: expected thresholds; got None: it saw no activations. Calibrate again")
    low, high = tables.numbers(site, "lower", lower), tables.numbers(site, "upper", upper)
    if levels is None:
        if site.tensor == "value":
            return tables.dynamic(site, channels, None, hints)
        return tables.static(site, low, high, None, hints)
    table = Table(site, tables.numbers(site, "levels", levels), hints)
    # Levels are in units of the activations: a codebook with scale 1 and offset 0 decodes to the levels themselves.
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    inner = Codebook(channels=channels, bits=table.bits, scale=ones, offset=zeros, **table.fields)
    if hints.outlier_fraction is None:
        return inner
    if site.tensor == "value":
        return PercentileSparse(channels=channels, inner=inner, outlier_fraction=hints.outlier_fraction)
    return ThresholdSparse(channels=channels, inner=inner, lower=low.float(), upper=high.float())
