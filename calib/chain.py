"""Sites fitted one after the other, later ones from what earlier ones are decoded to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from artifacts.sites import Site
from calib.estimators import Estimator, Fit
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.sources import Sources

_SITES_AT_HAND = 6
"""Statistics kept as they are read: those of two layers, where sites are predicted from the layer before."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class ChainFit:
    """Fits by site, and what the reservoir's tokens come back as."""

    fits: dict[Site, Fit]
    decoded: dict[Site, Float32[Tensor, "rows channels"]]


class Chain:
    """The statistics of a model's sites, and of every site beside those that it is predicted from.

    Parameters
    ----------
    statistics : ModelStatistics
        Of the model, tier `full`.
    sink_tokens : int
        First positions that take no part.
    """

    def __init__(self, statistics: ModelStatistics, sink_tokens: int) -> None:
        self.statistics, self.sink_tokens = statistics, sink_tokens
        self.site = lru_cache(maxsize=_SITES_AT_HAND)(self._site)

    def fit(self, estimators: Mapping[Site, Estimator], progress: Progress = iter) -> ChainFit:
        """Fits the sites in their order.

        Parameters
        ----------
        estimators : Mapping[Site, Estimator]
            Of every cached site.
        progress : callable
            Wraps the sites, for a progress bar.

        Raises
        ------
        ValueError
            If the statistics lack what an estimator reads.
        """
        found: dict[Site, Fit] = {}
        decoded: dict[Site, Tensor] = {}
        for site in progress(sorted(estimators)):
            names, own = estimators[site].sources(site, estimators), self.site(site)
            own.sources = self.sources(site, {name: decoded[name] for name in names}) if names else None
            fit = estimators[site].fit(own)
            decoded[site] = fit.quantizer.simulate(own.rows) if fit.decoded is None else fit.decoded
            found[site], own.sources = replace(fit, decoded=None), None
        return ChainFit(found, decoded)

    def sources(self, site: Site, decoded: Mapping[Site, Float32[Tensor, "rows _"]]) -> Sources:
        """What a site is predicted from.

        Parameters
        ----------
        site : Site
            The site.
        decoded : Mapping[Site, Float32[Tensor, "rows channels"]]
            The reservoir's tokens of earlier sites as they come back.
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
        )

    def _site(self, site: Site) -> SiteStatistics:
        return self.statistics.site(site, self.sink_tokens)

    def _covariance(self, a: Site, b: Site) -> Float64[Tensor, "_ _"]:
        left, right = self.site(a).layer_moments, self.site(b).layer_moments
        second = left.second()[0].cpu() if a == b else self.statistics.cross_second(a, b, self.sink_tokens)
        return second - left.mean().cpu()[:, None] * right.mean().cpu()
