"""Decoded sources of predictive quantizers, held while a step runs."""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.errors import MismatchError
from artifacts.quantizer import Context, Quantizer
from artifacts.sites import Site


class DecodedSources:
    """Decoded tokens of the sites that others are predicted from, held until the last of those has been read.

    If every layer is predicted from the one before, two layers of tokens are in memory in full precision.

    Parameters
    ----------
    quantizers : mapping from Site to Quantizer
        Quantizers of all sites.

    Raises
    ------
    MismatchError
        If a source has no quantizer.
    """

    def __init__(self, quantizers: Mapping[Site, Quantizer]) -> None:
        self._sources = {site: quantizer.sources for site, quantizer in quantizers.items()}
        self._last: dict[Site, Site] = {}
        self._rows: dict[tuple[Site, int], Tensor] = {}
        # Sites are sorted in the order in which the model computes them: the last assignment is the last reader.
        for site in sorted(self._sources):
            for source in self._sources[site]:
                if source not in quantizers:
                    raise MismatchError(
                        f"{site}: expected a quantizer for its source {source}; got none. Use all sites of an artifact."
                    )
                self._last[source] = site

    def __bool__(self) -> bool:
        """True if any site is predicted from another."""
        return bool(self._last)

    def empty(self) -> "DecodedSources":
        """Empty copy, for another cache with the same quantizers."""
        other = copy.copy(self)
        other._rows = {}
        return other

    def are_kept_of(self, site: Site) -> bool:
        """True if a later site is predicted from this one."""
        return site in self._last

    def context(self, site: Site, device: torch.device, sequence: int = 0, tokens: slice = slice(None)) -> Context:
        """Decoded sources of a site for some tokens of a sequence, as its quantizer takes them.

        Raises
        ------
        MismatchError
            If the model computes the site before its sources.
        """
        missing = [str(source) for source in self._sources[site] if (source, sequence) not in self._rows]
        if missing:
            raise MismatchError(
                f"{site}: expected its sources {', '.join(missing)} to be computed first; this model computes them "
                "later. Use quantizers without sources."
            )
        return tuple(self._rows[source, sequence][tokens].to(device) for source in self._sources[site])

    def keep(self, site: Site, rows: Float[Tensor, "tokens channels"], sequence: int = 0) -> None:
        """Holds the decoded tokens of a site."""
        self._rows[site, sequence] = rows

    def release(self, site: Site) -> None:
        """Frees the tokens that no site after this one is predicted from."""
        self._rows = {key: rows for key, rows in self._rows.items() if self._last[key[0]] > site}
