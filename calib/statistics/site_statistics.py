"""Calibration statistics of one site."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from artifacts.errors import InvalidValueError, MismatchError
from calib.statistics.channel_histogram import ChannelHistogram
from calib.statistics.moments import Moments
from calib.statistics.pair_norms import PairNorms, rotary_pairs
from calib.statistics.row_sample import RowChoice, RowSample
from calib.statistics.site_shape import SiteShape
from calib.statistics.sources import Sources
from calib.statistics.statistic import Statistic
from calib.statistics.tails import Tails
from calib.statistics.token_histogram import TokenHistogram

S = TypeVar("S", bound=Statistic)
Gradients = Float[Tensor, "tokens channels"] | None
Tier = Literal["basic", "full"]

FIRST_POSITIONS = 8
"""First positions of each window, stored separately so that a fit can leave out any number of sink tokens."""

SAMPLE_TOKENS = {"basic": 1024, "full": 4096}
"""Capacity of the token reservoir, and of the sample of first positions, by tier."""

FISHER = ("gradient_moments", "fisher_histogram", "fisher_token_histogram")
"""Statistics of gradients; all others are updated with vectors alone."""

_RESERVOIR = ("rows", "row_gradients")


class _Unread(NamedTuple):
    """Deferred update of a statistic: tokens to accumulate, on top of the state in `others`."""

    rows: Float[Tensor, "tokens channels"]
    gradients: Gradients
    others: "SiteStatistics | None" = None
    n_changes: int = 0


class SiteStatistics:
    """Tails, moments, histograms and sampled rows of one site.

    Positions 0 to 7 of each window are stored as rows only; `from_position` accumulates those that a fit includes.

    Parameters
    ----------
    shape : SiteShape
        Site and shape.
    tier : {'basic', 'full'}
        `full` adds the moments of the whole layer.
    fisher : bool
        Adds moments and rows of the loss gradients g, and histograms in which each value has the weight F = g^2 (arXiv
        2401.18079, equation 7), for keys and values.
    """

    def __init__(self, shape: SiteShape, tier: Tier, *, fisher: bool = False) -> None:
        self.shape, self.tier = shape, tier
        self.fisher = fisher and self.keeps_rows
        channels, sampled = shape.channels, ["first_rows"]
        self.statistics: dict[str, Statistic] = {"moments": Moments(channels, shape.heads)}
        if shape.site.tensor != "query":
            self.statistics["tails"] = Tails(channels)
            self.statistics["histogram"] = ChannelHistogram(channels)
            self.statistics["token_histogram"] = TokenHistogram(channels)
            sampled.append("rows")
            if tier == "full":
                self.statistics["layer_moments"] = Moments(channels, 1)
        if shape.rotary_dim:
            pairs = rotary_pairs(shape.heads, shape.head_dim, shape.rotary_dim, interleaved=shape.interleaved)
            self.statistics["pair_norms"] = PairNorms(pairs)
        if self.fisher:
            self.statistics["gradient_moments"] = Moments(channels, shape.heads)
            self.statistics["fisher_histogram"] = ChannelHistogram(channels, dtype=torch.float64)
            self.statistics["fisher_token_histogram"] = TokenHistogram(channels, dtype=torch.float64)
            sampled += ["first_gradients", "row_gradients"]
        self.query_energy: Float64[Tensor, " channels"] | None = None
        self.query_metric: Float64[Tensor, "heads head_dim head_dim"] | None = None
        self.token_weights: Float32[Tensor, " rows"] | None = None
        self.sources: Sources | None = None
        self.start_rows = torch.empty(0, channels)
        self.samples = {name: torch.empty(0, channels) for name in sampled}
        self._unread: dict[str, _Unread] = {}
        self._n_changes = 0

    @property
    def keeps_rows(self) -> bool:
        """True for keys and values, which are in the token reservoir; queries are not."""
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
        """Histogram of values normalised by the range of their token."""
        return self._get("token_histogram", TokenHistogram)

    @property
    def moments(self) -> Moments:
        """Per-head moments."""
        return self._get("moments", Moments)

    @property
    def layer_moments(self) -> Moments:
        """Moments of the whole layer."""
        return self._get("layer_moments", Moments)

    @property
    def gradient_moments(self) -> Moments:
        """Per-head moments of the gradients: E[g g^T]."""
        return self._get("gradient_moments", Moments)

    @property
    def fisher_histogram(self) -> ChannelHistogram:
        """Sums of F in the bins of `histogram`."""
        return self._get("fisher_histogram", ChannelHistogram)

    @property
    def fisher_token_histogram(self) -> TokenHistogram:
        """Sums of F, and of F times the squared half-range of the token, in the bins of `token_histogram`."""
        return self._get("fisher_token_histogram", TokenHistogram)

    @property
    def rows(self) -> Float32[Tensor, "rows channels"]:
        """Vectors of the token reservoir; empty for queries."""
        return self.samples.get("rows", torch.empty(0, self.shape.channels))

    @property
    def row_gradients(self) -> Float32[Tensor, "rows channels"]:
        """Gradients at the vectors in `rows`."""
        if not self.fisher:
            raise self._lacks("row_gradients")
        return self.samples["row_gradients"]

    @property
    def first_rows(self) -> Float32[Tensor, "rows channels"]:
        """Vectors of the sampled first positions."""
        return self.samples["first_rows"]

    def update(self, x: Float[Tensor, "tokens channels"], gradients: Gradients = None) -> None:
        """Accumulates tokens beyond the first positions."""
        self._n_changes += 1
        for name in self.statistics:
            self._read(name)
            self._update(name, x, gradients)

    def keep_rows(self, x: Float[Tensor, "tokens channels"], choice: RowChoice, gradients: Gradients = None) -> None:
        """Updates the rows of the token reservoir."""
        self._keep(choice, rows=x, row_gradients=gradients)

    def keep_first_rows(
        self, x: Float[Tensor, "tokens channels"], choice: RowChoice, gradients: Gradients = None
    ) -> None:
        """Updates the sample of first positions."""
        self._keep(choice, first_rows=x, first_gradients=gradients)

    def merge(self, other: "SiteStatistics", rows: RowChoice, first_rows: RowChoice) -> None:
        """Adds the statistics of another shard."""
        self._n_changes += 1
        for name in self.statistics:
            self._read(name).merge(other._read(name))
        self._keep(rows, **{name: t for name, t in other.samples.items() if name in _RESERVOIR})
        self._keep(first_rows, **{name: t for name, t in other.samples.items() if name not in _RESERVOIR})

    def from_position(self, sink_tokens: int, sample: RowSample, first: RowSample) -> "SiteStatistics":
        """Statistics of all positions from `sink_tokens` on, each computed on first access.

        First tokens that are left out are the `start_rows` of the result.
        """
        # State of positions 8 and above, plus the sampled rows of positions sink_tokens to 7: no second model pass.
        chosen = SiteStatistics(self.shape, self.tier, fisher=self.fisher)
        kept, device = first.positions >= sink_tokens, self.moments.sums.device
        gradients = self.samples["first_gradients"][kept].to(device) if self.fisher else None
        rows = self.first_rows[kept].to(device)
        chosen._unread = {name: _Unread(rows, gradients, self, self._n_changes) for name in self.statistics}
        chosen.samples |= self.samples
        for name in chosen.samples.keys() & set(_RESERVOIR):
            chosen.samples[name] = self.samples[name][sample.positions >= sink_tokens]
        chosen.start_rows = self.first_rows[(first.positions == 0) & ~kept]
        return chosen

    def mapped(
        self, rows: Float32[Tensor, "rows channels"], gradients: Float32[Tensor, "rows channels"] | None = None
    ) -> "SiteStatistics":
        """Statistics of transformed reservoir tokens: the input of the estimator inside a wrapper.

        Each is computed on first access, as a fit reads few of them.

        Parameters
        ----------
        rows : Float32[Tensor, "rows channels"]
            Tokens of `self.rows` after the transform.
        gradients : Float32[Tensor, "rows channels"] or None
            Gradients with respect to the transformed tokens; None for statistics without gradients.
        """
        # Transformed channels have no rotary pairs. Query metric and energy are left for the wrapper to transform.
        found = SiteStatistics(replace(self.shape, rotary_dim=0), self.tier, fisher=gradients is not None)
        found._unread = {name: _Unread(rows, gradients) for name in found.statistics}
        found.samples["rows"] = rows
        if gradients is not None:
            found.samples["row_gradients"] = gradients
        found.token_weights = self.token_weights
        return found

    def state(self) -> dict[str, Tensor]:
        """State tensors by name."""
        found = {
            f"{name}.{key}": tensor for name in self.statistics for key, tensor in self._read(name).state().items()
        }
        return {**found, "rows": self.rows, **self.samples}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restores the output of `state`.

        Raises
        ------
        ValueError
            If a tensor is missing or has another shape.
        """
        for name, statistic in self.statistics.items():
            statistic.restore({key.split(".", 1)[1]: t for key, t in state.items() if key.startswith(f"{name}.")})
        for name in self.samples:
            rows = state.get(name)
            if rows is None or rows.ndim != 2 or rows.shape[1] != self.shape.channels:
                got = "nothing" if rows is None else f"shape {tuple(rows.shape)}"
                raise InvalidValueError(
                    f"{self.shape.site}: {name} must have {self.shape.channels} channels; got {got}"
                )
            self.samples[name] = rows

    def estimated_bytes(self) -> int:
        """Memory in bytes when the samples are full."""
        # Rows are float32, 4 bytes a value; all other state has its final size from the start.
        fixed = sum(statistic.nbytes for statistic in self.statistics.values())
        return fixed + len(self.samples) * SAMPLE_TOKENS[self.tier] * self.shape.channels * 4

    def _keep(self, choice: RowChoice, **arriving: Gradients) -> None:
        for name, rows in arriving.items():
            if rows is not None:
                self.samples[name] = choice.apply(self.samples[name], rows.float().cpu())

    def _get(self, name: str, kind: type[S]) -> S:
        statistic = self.statistics.get(name)
        if not isinstance(statistic, kind):
            raise self._lacks(name)
        self._read(name)
        return statistic

    def _read(self, name: str) -> Statistic:
        """Statistic by name, computed on first access."""
        if name in self._unread:
            unread = self._unread[name]
            if unread.others is not None:
                self.statistics[name].restore(unread.others._unchanged(name, unread.n_changes).state())
            del self._unread[name]
            self._update(name, unread.rows, unread.gradients)
        return self.statistics[name]

    def _unchanged(self, name: str, n_changes: int) -> Statistic:
        """Statistic by name, if there was no update since the `n_changes`-th."""
        if self._n_changes != n_changes:
            raise InvalidValueError(
                f"{self.shape.site}: tokens were added before {name} of a selection of positions was first read; "
                "select the positions again"
            )
        return self._read(name)

    def _update(self, name: str, x: Float[Tensor, "tokens channels"], gradients: Gradients) -> None:
        statistic = self.statistics[name]
        if name not in FISHER:
            statistic.update(x)
        # Weights of values are the diagonal Fisher information g^2 (arXiv 2401.18079, equation 7).
        elif gradients is not None and isinstance(statistic, ChannelHistogram | TokenHistogram):
            statistic.update(x, gradients.double().square())
        elif gradients is not None:
            statistic.update(gradients)

    def _lacks(self, name: str) -> MismatchError:
        needed = f"{name}, which statistics of tier {self.tier} lack. Calibrate again with --statistics full."
        if name in (*FISHER, "row_gradients"):
            needed = "squared gradients, which these statistics lack. Calibrate again with --fisher."
        return MismatchError(f"{self.shape.site}: the recipe needs {needed}")
