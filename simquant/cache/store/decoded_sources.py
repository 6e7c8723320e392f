"""What later sites are predicted from, while a step runs."""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.errors import MismatchError
from artifacts.quantizer import Context, Quantizer
from artifacts.sites import Site


class DecodedSources:
    """Decoded tokens of sources, by sequence, kept until the last site that is predicted from them has read them.

    Where every layer is predicted from the one before, that is two layers' tokens in full precision.

    Parameters
    ----------
    quantizers : mapping from Site to Quantizer
        Of all sites.

    Raises
    ------
    MismatchError
        If a source has no quantizer.
    """

    def __init__(self, quantizers: Mapping[Site, Quantizer]) -> None:
        self._sources = {site: quantizer.sources for site, quantizer in quantizers.items()}
        self._last: dict[Site, Site] = {}
        self._rows: dict[tuple[Site, int], Tensor] = {}
        for site in sorted(self._sources):
            for source in self._sources[site]:
                if source not in quantizers:
                    raise MismatchError(
                        f"{site}: it is predicted from {source}, which has no quantizer. Use all sites of an artifact."
                    )
                self._last[source] = site

    def __bool__(self) -> bool:
        """Whether any site is predicted."""
        return bool(self._last)

    def empty(self) -> "DecodedSources":
        """For another cache with the same quantizers."""
        other = copy.copy(self)
        other._rows = {}
        return other

    def are_kept_of(self, site: Site) -> bool:
        """Whether a later site is predicted from this one."""
        return site in self._last

    def context(self, site: Site, device: torch.device, sequence: int = 0, tokens: slice = slice(None)) -> Context:
        """What a site's quantizer is handed for some tokens of a sequence.

        Raises
        ------
        MismatchError
            If the model comes to the site before it comes to the sources.
        """
        missing = [str(source) for source in self._sources[site] if (source, sequence) not in self._rows]
        if missing:
            raise MismatchError(f"{site}: this model has it before {', '.join(missing)}, from which it is predicted")
        return tuple(self._rows[source, sequence][tokens].to(device) for source in self._sources[site])

    def keep(self, site: Site, rows: Float[Tensor, "tokens channels"], sequence: int = 0) -> None:
        """Takes down what a site's tokens are decoded to."""
        self._rows[site, sequence] = rows

    def release(self, site: Site) -> None:
        """Lets go what no site after this one reads."""
        self._rows = {key: rows for key, rows in self._rows.items() if self._last[key[0]] > site}
