"""All that is kept of one site."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from artifacts.errors import NonFiniteError
from artifacts.sites import Site
from calib.statistics.channel_histogram import ChannelHistogram
from calib.statistics.moments import Moments
from calib.statistics.pair_norms import PairNorms, rotary_pairs
from calib.statistics.row_sample import Choice, RowSample
from calib.statistics.statistic import Statistic
from calib.statistics.tails import Tails
from calib.statistics.token_histogram import TokenHistogram

S = TypeVar("S", bound=Statistic)
Tier = Literal["basic", "full"]

HEAD_POSITIONS = 8
"""First positions of each window that are kept apart, so that a fit can leave out any number of them."""

SAMPLE_TOKENS = {"basic": 1024, "full": 4096}
"""Capacity of the token reservoir, and of the sample of head positions, by tier."""


@dataclass(frozen=True, kw_only=True)
class SiteShape:
    """What a site's statistics need to know of its layer.

    Parameters
    ----------
    site : Site
        The place.
    heads, head_dim : int
        Heads (query heads for queries) and channels of each.
    rotary_dim : int
        Leading channels of a head that rotate; 0 where nothing does.
    interleaved : bool
        How the rotating channels pair up.
    """

    site: Site
    heads: int
    head_dim: int
    rotary_dim: int = 0
    interleaved: bool = False

    @property
    def channels(self) -> int:
        """Width of a token's vector."""
        return self.heads * self.head_dim


class SiteStatistics:
    """Tails, moments, histograms and sampled rows of one site.

    Positions 0 to 7 of each window are only kept as rows; `from_position` takes those in that a fit wants.

    Parameters
    ----------
    shape : SiteShape
        Place and shape.
    tier : {'basic', 'full'}
        `full` adds the moments of the whole layer.
    """

    def __init__(self, shape: SiteShape, tier: Tier) -> None:
        self.shape, self.tier = shape, tier
        channels = shape.channels
        self.statistics: dict[str, Statistic] = {"moments": Moments(channels, shape.heads)}
        if shape.site.tensor != "query":
            self.statistics["tails"] = Tails(channels)
            self.statistics["histogram"] = ChannelHistogram(channels)
            self.statistics["token_histogram"] = TokenHistogram(channels)
            if tier == "full":
                self.statistics["layer_moments"] = Moments(channels, 1)
        if shape.rotary_dim:
            pairs = rotary_pairs(shape.heads, shape.head_dim, shape.rotary_dim, interleaved=shape.interleaved)
            self.statistics["pair_norms"] = PairNorms(pairs)
        self.query_energy: Float64[Tensor, " channels"] | None = None
        self.head_rows = torch.empty(0, channels)
        self.rows = torch.empty(0, channels)

    @property
    def keeps_rows(self) -> bool:
        """Whether the site takes part in the token reservoir (queries do not)."""
        return self.shape.site.tensor != "query"

    @property
    def tails(self) -> Tails:
        """Exact tails of each channel."""
        return self._get("tails", Tails)

    @property
    def histogram(self) -> ChannelHistogram:
        """Histogram of each channel."""
        return self._get("histogram", ChannelHistogram)

    @property
    def token_histogram(self) -> TokenHistogram:
        """Histogram of values within their token's range."""
        return self._get("token_histogram", TokenHistogram)

    @property
    def moments(self) -> Moments:
        """Per-head moments."""
        return self._get("moments", Moments)

    def update(self, x: Float[Tensor, "tokens channels"]) -> None:
        """Takes in tokens beyond the head positions."""
        for statistic in self.statistics.values():
            statistic.update(x)

    def keep_rows(self, x: Float[Tensor, "tokens channels"], choice: Choice) -> None:
        """Takes part in the token reservoir."""
        self.rows = choice.apply(self.rows, x.float().cpu())

    def keep_head_rows(self, x: Float[Tensor, "tokens channels"], choice: Choice) -> None:
        """Takes part in the sample of head positions."""
        self.head_rows = choice.apply(self.head_rows, x.float().cpu())

    def merge(self, other: "SiteStatistics", rows: Choice, head_rows: Choice) -> None:
        """Takes in what another shard has seen."""
        for name, statistic in self.statistics.items():
            statistic.merge(other.statistics[name])
        if self.keeps_rows:
            self.rows = rows.apply(self.rows, other.rows)
        self.head_rows = head_rows.apply(self.head_rows, other.head_rows)

    def from_position(self, sink_tokens: int, sample: RowSample, head: RowSample) -> "SiteStatistics":
        """The statistics of all positions from `sink_tokens` on."""
        chosen = SiteStatistics(self.shape, self.tier)
        chosen.restore(self.state())
        chosen.update(self.head_rows[head.positions >= sink_tokens].to(self.moments.sums.device))
        if self.keeps_rows:
            chosen.rows = self.rows[sample.positions >= sink_tokens]
        return chosen

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        found = {
            f"{name}.{key}": tensor
            for name, statistic in self.statistics.items()
            for key, tensor in statistic.state().items()
        }
        return {**found, "rows": self.rows, "head_rows": self.head_rows}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave.

        Raises
        ------
        ValueError
            If a tensor is missing or has another shape.
        """
        for name, statistic in self.statistics.items():
            statistic.restore({key.split(".", 1)[1]: t for key, t in state.items() if key.startswith(f"{name}.")})
        for name in ("rows", "head_rows"):
            rows = state.get(name)
            if rows is None or rows.ndim != 2 or rows.shape[1] != self.shape.channels:
                raise ValueError(f"{self.shape.site}: {name} must have {self.shape.channels} channels")
            setattr(self, name, rows)

    def estimated_bytes(self) -> int:
        """Memory when the samples are full."""
        fixed = sum(statistic.nbytes for statistic in self.statistics.values())
        rows = SAMPLE_TOKENS[self.tier] * (2 if self.keeps_rows else 1)
        return fixed + rows * self.shape.channels * 4

    def _get(self, name: str, kind: type[S]) -> S:
        statistic = self.statistics.get(name)
        if not isinstance(statistic, kind):
            raise ValueError(
                f"{self.shape.site}: the recipe needs {name}, which these statistics (tier {self.tier}) lack. "
                "Calibrate again with --statistics full."
            )
        return statistic


def query_energy(key: SiteShape, query: SiteStatistics) -> Float64[Tensor, " channels"]:
    """Weight of an error in each key channel: E[q^2] of the queries that read it, alike for both of a rotary pair.

    Averaged over relative positions, the squared error of a logit is the sum over pairs of E|q_pair|^2 / 2 times the
    pair's squared key error.
    """
    squares = query.moments.second().diagonal(dim1=1, dim2=2)
    energy = squares.reshape(key.heads, -1, key.head_dim).mean(dim=1).reshape(-1).cpu()
    if key.rotary_dim:
        first, second = rotary_pairs(key.heads, key.head_dim, key.rotary_dim, interleaved=key.interleaved)
        energy[first] = energy[second] = (energy[first] + energy[second]) / 2
    return energy


def check_finite(site: Site, x: Float[Tensor, "tokens channels"], windows: Tensor) -> None:
    """Every value is finite.

    Raises
    ------
    NonFiniteError
        With the site, the window and the count, if one is not.
    """
    if torch.isfinite(x.sum()):  # a sum over NaN or infinity is neither, and costs a third of the whole mask
        return
    bad = ~torch.isfinite(x)
    if bad.any():
        first = int(windows[bad.any(dim=1).to(windows.device)][0])
        raise NonFiniteError(
            f"{site}: {int(bad.sum())} of {x.numel()} values are NaN or infinite, first in window {first}. "
            "The model itself overflows there: try --dtype float32 or bfloat16, or other calibration text."
        )
