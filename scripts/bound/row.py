"""Rows of the table: limits at a rate, and recipes at theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from artifacts.sites import Site
from kvgauge.terminal.text_table import text_table
from scripts.bound.coded import Coded
from scripts.bound.limits import LIMITS, SiteLimits

TENSORS = ("key", "value")


@dataclass(frozen=True)
class Row:
    """Means over the sites of keys, and over those of values.

    Parameters
    ----------
    name : str
        Of a limit, or a recipe.
    bits, decibels : Mapping[str, float]
        By `key` and `value`: bits of a channel, and weighted distortion over weighted variance in dB.
    above : Mapping[str, Mapping[str, float]]
        dB above each of `LIMITS`, every site at its own rate.
    """

    name: str
    bits: Mapping[str, float]
    decibels: Mapping[str, float]
    above: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, name: str, coded: Mapping[Site, Coded], limits: Mapping[Site, SiteLimits]) -> "Row":
        """The row of what was coded."""
        sites = {tensor: [site for site in coded if site.tensor == tensor] for tensor in TENSORS}

        def above(limit: str, site: Site) -> float:
            return coded[site].decibels - limits[site].decibels(limit, coded[site].bits)

        return cls(
            name,
            bits={tensor: fmean(coded[site].bits for site in own) for tensor, own in sites.items()},
            decibels={tensor: fmean(coded[site].decibels for site in own) for tensor, own in sites.items()},
            above={
                limit: {tensor: fmean(above(limit, site) for site in own) for tensor, own in sites.items()}
                for limit in LIMITS
            },
        )

    def cells(self) -> list[str]:
        """A line of the table."""
        pairs = [(self.bits, ".2f"), (self.decibels, ".1f"), *((self.above[limit], ".1f") for limit in LIMITS)]
        return [self.name, *(" / ".join(format(pair[tensor], spec) for tensor in TENSORS) for pair, spec in pairs)]


def limit_row(limit: str, bits: float, limits: Mapping[Site, SiteLimits]) -> Row:
    """The row of an ideal coder."""
    ideal = {site: Coded(bits, own.decibels(limit, bits)) for site, own in limits.items()}
    return Row.of(f"limit: {limit}, {bits:g} bits", ideal, limits)


def table(rows: Sequence[Row]) -> str:
    """All rows; every cell is of keys / of values."""
    heads = ["", "bits", "distortion, dB", *(f"above {limit}" for limit in LIMITS)]
    return text_table(heads, [row.cells() for row in rows])
