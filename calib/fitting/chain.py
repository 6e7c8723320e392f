"""Sequential fits of sites, in which later sites are predicted from the dequantized vectors of earlier ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from artifacts.sites import Site
from calib.estimators import Estimator, Fit
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.sources import Shrinkage, Sources

_SITES_AT_HAND = 6
"""Sites whose statistics are cached: those of two layers, as sites are predicted from the layer before."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Link:
    """Fit of a site, with its reservoir tokens in full precision and dequantized."""

    site: Site
    fit: Fit
    rows: Float32[Tensor, "rows channels"]
    decoded: Float32[Tensor, "rows channels"]


class Chain:
    """Statistics of all sites, with the inputs of their predictors, for repeated sequential fits.

    The regularisation of a predictor is chosen in the first fit and reused in later ones with other bits.

    Parameters
    ----------
    statistics : ModelStatistics
        Statistics of the tier `full`.
    sink_tokens : int
        First positions that are left out.
    """

    def __init__(self, statistics: ModelStatistics, sink_tokens: int) -> None:
        self.statistics, self.sink_tokens = statistics, sink_tokens
        self.site = lru_cache(maxsize=_SITES_AT_HAND)(self._site)
        self._shrinkages: dict[Site, Shrinkage] = {}

    def fit(self, estimators: Mapping[Site, Estimator], progress: Progress = iter) -> dict[Site, Fit]:
        """Fits all sites in order.

        Parameters
        ----------
        estimators : Mapping[Site, Estimator]
            Estimator of every cached site.
        progress : callable
            Wraps the sites, for a progress bar.

        Raises
        ------
        ValueError
            If the statistics lack a part that an estimator needs.
        """
        return {link.site: link.fit.kept() for link in self.links(estimators, progress)}

    def links(self, estimators: Mapping[Site, Estimator], progress: Progress = iter) -> Iterator[Link]:
        """Iterator over the fits of all sites; parameters and errors are those of `fit`."""
        order = sorted(estimators)
        last_reader = {name: site for site in order for name in estimators[site].sources(site, estimators)}
        decoded: dict[Site, Tensor] = {}
        for site in progress(order):
            names, own = estimators[site].sources(site, estimators), self.site(site)
            own.sources = self.sources(site, {name: decoded[name] for name in names}) if names else None
            # Statistics are cached over rounds: dropping the sources releases the tokens of other sites.
            fit, own.sources = estimators[site].fit(own), None
            if fit.shrinkage is not None:
                self._shrinkages[site] = fit.shrinkage
            decoded[site] = fit.quantizer.simulate(own.rows) if fit.decoded is None else fit.decoded
            yield Link(site, fit, own.rows, decoded[site])
            # Dequantized tokens are needed only until the last site that is predicted from them.
            decoded = {name: rows for name, rows in decoded.items() if last_reader.get(name, site) > site}

    def sources(self, site: Site, decoded: Mapping[Site, Float32[Tensor, "rows _"]]) -> Sources:
        """Inputs of the predictor of a site.

        Parameters
        ----------
        site : Site
            Predicted site.
        decoded : Mapping[Site, Float32[Tensor, "rows channels"]]
            Dequantized reservoir tokens of earlier sites.
        """
        own, parts = self.site(site), [self.site(name) for name in decoded]
        rows = [[self._covariance(a, b) for b in (*decoded, site)] for a in decoded]
        covariance = torch.cat([torch.cat(row, dim=1) for row in rows])
        return Sources(
            sites=tuple(decoded),
            widths=tuple(part.shape.channels for part in parts),
            decoded=torch.cat(list(decoded.values()), dim=1),
            exact=torch.cat([part.rows for part in parts], dim=1),
            n_tokens=int(own.layer_moments.n_tokens),
            mean=torch.cat([part.layer_moments.mean().cpu() for part in parts]),
            target_mean=own.layer_moments.mean().cpu(),
            covariance=covariance[:, : len(covariance)],
            cross_covariance=covariance[:, len(covariance) :],
            shrinkage=self._shrinkages.get(site),
        )

    def _site(self, site: Site) -> SiteStatistics:
        return self.statistics.site(site, self.sink_tokens)

    def _covariance(self, a: Site, b: Site) -> Float64[Tensor, "_ _"]:
        left, right = self.site(a).layer_moments, self.site(b).layer_moments
        # Cov(a, b) = E[a b^T] - E[a] E[b]^T.
        second = left.second()[0].cpu() if a == b else self.statistics.cross_second(a, b, self.sink_tokens)
        return second - left.mean().cpu()[:, None] * right.mean().cpu()
