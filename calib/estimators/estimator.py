"""The contract of every estimator.

A final subclass is a frozen pydantic model: its fields are hyper-parameters that a recipe names, nothing fitted is kept
in it, and `fit` is a pure function of the statistics.
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
from calib.statistics.site_statistics import SiteShape, SiteStatistics
from calib.statistics.sources import Shrinkage

Steps = tuple[tuple[float, float], ...]

EXACT = "exact statistics"
_TRIAL_TOKENS = 16


@dataclass(frozen=True)
class Allowance:
    """Numbers of bits that a site can be given out of a budget for all of them.

    Parameters
    ----------
    unit_bits : int
        Bits of a token that are given at a time.
    least, most : float
        Limits, in bits per channel.
    """

    unit_bits: int
    least: float
    most: float


@dataclass(frozen=True)
class Fit:
    """A quantizer, what it was read from, and what other numbers of bits would have cost.

    Parameters
    ----------
    quantizer : Quantizer
        What was fitted.
    source : str
        Exact statistics, or an approximation and which.
    steps : tuple of (float, float)
        Where bits may be any: how much less distortion each step brings per bit, and its bits, in the order in which
        they are taken; else empty.
    trade : callable or None
        Finds the steps, for the budget that asks for them.
    decoded : Float32[Tensor, "rows channels"] or None
        What the tokens of the reservoir come back as, where the fit has found that.
    shrinkage : Shrinkage or None
        That of its predictor, where there is one.
    """

    quantizer: Quantizer
    source: str
    steps: Steps = ()
    trade: Callable[[], Steps] | None = None
    decoded: Float32[Tensor, "rows channels"] | None = None
    shrinkage: Shrinkage | None = None

    def kept(self) -> "Fit":
        """Without what holds on to tokens."""
        return replace(self, trade=None, decoded=None)

    def priced(self) -> "Fit":
        """With its steps."""
        return replace(self, steps=self.trade() if self.trade else self.steps)


class Estimator(BaseModel, ABC):
    """Hyper-parameters of a quantizer, and the way from statistics to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def fit(self, statistics: SiteStatistics) -> Fit:
        """The quantizer for a site."""

    @abstractmethod
    def dynamic(self, shape: SiteShape) -> Quantizer:
        """The quantizer that finds every parameter when it encodes, where there is one.

        Raises
        ------
        ValueError
            If the method cannot do without calibration.
        """

    @property
    def needs_fisher(self) -> bool:
        """Whether the fit reads squared gradients."""
        return False

    @property
    def needs_full(self) -> bool:
        """Whether the fit reads what only statistics of the tier `full` hold."""
        return False

    @property
    def allowance(self) -> Allowance | None:
        """What `bits` may be where they come out of a budget for all sites; None where they cannot."""
        return None

    def sources(self, site: Site, sites: Collection[Site]) -> tuple[Site, ...]:
        """Those of `sites`, all earlier, whose decoded vectors the fit reads."""
        return ()

    @final
    def check(self, shape: SiteShape) -> None:
        """Fits made-up tokens of this shape, so that what does not go with it is found before a model runs.

        Raises
        ------
        ValueError
            If the hyper-parameters do not go with the shape.
        """
        self.fit(trial_statistics(shape))


def trial_statistics(shape: SiteShape) -> SiteStatistics:
    """Statistics of a few made-up tokens, with everything that an estimator can read."""
    x = torch.randn(_TRIAL_TOKENS, shape.channels, generator=torch.Generator().manual_seed(0))
    statistics = SiteStatistics(replace(shape, rotary_dim=0), "full", fisher=True)
    statistics.update(x, x)
    statistics.samples |= {"rows": x, "row_gradients": x}
    if shape.site.tensor == "key":
        statistics.query_metric = torch.eye(shape.head_dim, dtype=torch.float64).expand(shape.heads, -1, -1)
        statistics.query_energy = torch.ones(shape.channels, dtype=torch.float64)
    else:
        statistics.token_weights = torch.ones(len(x))
    return statistics
