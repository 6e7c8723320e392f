"""KVQuant's `quantizers.pickle`: a tuple (upper, lower, [levels], normscale, normoffset) for each projection.

References
----------
arXiv 2401.18079; `quant/llama_simquant.py` of its code, which writes and reads these files.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from artifacts.errors import CorruptArtifactError
from artifacts.importers import tables
from artifacts.importers.hints import Hints
from artifacts.importers.tables import Table
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.storage import naming


def quantizers(path: Path, content: dict[Any, Any], hints: Hints) -> tuple[dict[Site, Quantizer], list[str]]:
    """Quantizers of the file, and notices of assumptions.

    Raises
    ------
    ArtifactError
        If an entry is damaged, or a hint is missing or contradicts the file.
    """
    with naming(path):
        entries, notices = tables.by_site(content)
        parsed = {site: _Entry(site, entry, hints) for site, entry in sorted(entries.items())}
        found = {site: entry.quantizer(_channels(site, parsed), hints) for site, entry in parsed.items()}
    return found, [*notices, *_notices(parsed, hints)]


class _Entry:
    """One tuple of the file, read by position; unknown entries at its end are left out."""

    def __init__(self, site: Site, entry: object, hints: Hints) -> None:
        if not isinstance(entry, tuple | list) or len(entry) < 2:
            raise CorruptArtifactError(f"{site}: expected (upper, lower, ...); got {type(entry).__name__}")
        upper, lower, *more = entry
        self.site = site
        self.shape = tuple(getattr(upper, "shape", ()))
        self.upper, self.lower = tables.numbers(site, "upper", upper), tables.numbers(site, "lower", lower)
        self.table = self._table(more, hints)
        # Behind the two ends: the levels, then Q-Norm's scale and offset where the file has them.
        n_known = 1 + 2 * _is_norm(more) if self.table is not None else 0
        self.n_left_out = 0 if hints.normal_float else len(more) - n_known

    @property
    def per_token(self) -> bool:
        """True for ranges of shape (tokens, 1); flat ones are per token for values and per channel for keys."""
        if len(self.shape) == 2:
            return bool(self.shape[1] == 1 and self.shape[0] > 1)
        return self.site.tensor == "value"

    def quantizer(self, channels: int, hints: Hints) -> Quantizer:
        if self.per_token:
            return tables.dynamic(self.site, channels, self.table, hints)
        return tables.static(self.site, self.lower, self.upper, self.table, hints)

    def _table(self, more: list[Any], hints: Hints) -> Table | None:
        if more and not isinstance(more[0], int | float | None):
            levels = tables.numbers(self.site, "levels", more[0])
            if not _is_norm(more):
                return Table(self.site, levels, hints)
            gain, shift = (float(tables.numbers(self.site, "norm", value)[0]) for value in more[1:3])
            return Table(self.site, levels, hints, gain, shift)
        if hints.normal_float:
            return Table(self.site, tables.normal_float(hints.bits_of_range(str(self.site))).double(), hints)
        return None


def _is_norm(more: list[Any]) -> bool:
    """True for Q-Norm parameters, which are tensors; old files have plain numbers of another meaning there."""
    return len(more) >= 3 and all(isinstance(value, Tensor) and value.numel() == 1 for value in more[1:3])


def _channels(site: Site, parsed: dict[Site, _Entry]) -> int:
    # Ranges per token do not tell the number of channels: take it from the site, its layer, or any other site. Keys
    # and values of a layer have the same shape.
    own = parsed[site]
    same_layer = [e for s, e in parsed.items() if s.layer == site.layer and not e.per_token]
    for entry in [own, *same_layer, *parsed.values()]:
        if not entry.per_token:
            return len(entry.upper)
    raise CorruptArtifactError(
        f"{site}: expected an entry with ranges per channel, to know the number of channels; got none in the file"
    )


def _notices(parsed: dict[Site, _Entry], hints: Hints) -> list[str]:
    notices = []
    if any(entry.per_token for entry in parsed.values()):
        notices.append("thresholds of calibration tokens are left out: the range is computed per token, as in KVQuant")
    if hints.outlier_fraction is None:
        notices.append(
            "the file does not record outliers: assumed none, values beyond a range saturate. "
            "If it was made with them, add --include-sparse --sparsity-threshold 0.99"
        )
    if not hints.sink_tokens:
        notices.append("the file does not record sink tokens: assumed none (--first-few-fp16 N)")
    if any(entry.table is None for entry in parsed.values()):
        notices.append("ranges without levels: assumed uniform grids (--nf for NormalFloat)")
    n_left_out = sum(entry.n_left_out for entry in parsed.values())
    if n_left_out:
        notices.append(f"{n_left_out} unknown entries at the end of tuples were left out")
    return notices
