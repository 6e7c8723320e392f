"""Base class of all estimators, and the contract of a new one.

A final subclass is a frozen pydantic model: its fields are hyper-parameters that a recipe sets, it holds no fitted
state, and `fit` is a pure function of the statistics.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float32
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.sources import Shrinkage

Steps = tuple[tuple[float, float], ...]

EXACT = "exact statistics"
_TRIAL_TOKENS = 16


@dataclass(frozen=True)
class Allowance:
    """Code widths that a bit allocation may choose for a site.

    Parameters
    ----------
    unit_bits : int
        Granularity, in bits per token.
    least, most : float
        Limits, in bits per channel.
    """

    unit_bits: int
    least: float
    most: float


@dataclass(frozen=True)
class Fit:
    """Result of a fit: a quantizer, its provenance, and its rate-distortion curve.

    Parameters
    ----------
    quantizer : Quantizer
        Fitted quantizer.
    source : str
        Exact statistics, or the name of an approximation.
    steps : tuple of (float, float)
        Rate-distortion curve for a bit allocation: distortion saved per bit, and bits, of successive increments; empty
        without one.
    trade : callable or None
        Computes the steps on demand.
    decoded : Float32[Tensor, "rows channels"] or None
        Dequantized reservoir tokens, if the fit has computed them.
    shrinkage : Shrinkage or None
        Regularisation of the predictor, if there is one.
    """

    quantizer: Quantizer
    source: str
    steps: Steps = ()
    trade: Callable[[], Steps] | None = None
    decoded: Float32[Tensor, "rows channels"] | None = None
    shrinkage: Shrinkage | None = None

    def kept(self) -> "Fit":
        """The result without references to tokens, to free memory."""
        return replace(self, trade=None, decoded=None)

    def priced(self) -> "Fit":
        """The result with its rate-distortion curve computed."""
        return replace(self, steps=self.trade() if self.trade else self.steps)


class Estimator(BaseModel, ABC):
    """Base of estimators: hyper-parameters of a quantizer and its fit to statistics."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def fit(self, statistics: SiteStatistics) -> Fit:
        """Fitted quantizer for a site."""

    @abstractmethod
    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Quantizer without calibration: all its parameters are fixed or dynamic.

        Raises
        ------
        ValueError
            If the method needs calibration.
        """

    @property
    def needs_fisher(self) -> bool:
        """True if the fit needs squared gradients."""
        return False

    @property
    def needs_full(self) -> bool:
        """True if the fit needs statistics of the tier `full`."""
        return False

    @property
    def allowance(self) -> Allowance | None:
        """Values of `bits` that a bit allocation may choose; None for a method without bit allocation."""
        return None

    def sources(self, site: Site, sites: Collection[Site]) -> tuple[Site, ...]:
        """Earlier sites among `sites` whose dequantized vectors the fit needs."""
        return ()

    @final
    def check(self, shape: SiteShape) -> Quantizer:
        """Quantizer of random tokens of this shape, to find unsuitable hyper-parameters before a model runs.

        Raises
        ------
        ValueError
            If the hyper-parameters do not suit the shape.
        """
        return self.fit(trial_statistics(shape)).quantizer


def trial_statistics(shape: SiteShape) -> SiteStatistics:
    """Statistics of a few random tokens, with everything that an estimator can need."""
    x = torch.randn(_TRIAL_TOKENS, shape.channels, generator=torch.Generator().manual_seed(0))
    statistics = SiteStatistics(replace(shape, rotary_dim=0), "full", fisher=True)
    statistics.update(x, x)
    statistics.samples |= {"rows": x, "row_gradients": x}
    statistics.start_rows = x / 10
    if shape.site.tensor == "key":
        statistics.query_metric = torch.eye(shape.head_dim, dtype=torch.float64).expand(shape.heads, -1, -1)
        statistics.query_energy = torch.ones(shape.channels, dtype=torch.float64)
    else:
        statistics.token_weights = torch.ones(len(x))
    return statistics
