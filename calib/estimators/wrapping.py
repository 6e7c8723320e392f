"""What estimators of wrapping quantizers share: the entry of what they wrap."""

from dataclasses import replace

from calib.estimators.estimator import EXACT, Allowance, Estimator, Fit
from calib.statistics.site_statistics import SiteStatistics


class WrappingEstimator(Estimator):
    """An estimator that maps the tokens, has another one fit what results, and wraps that.

    Parameters
    ----------
    inner : estimator
        Of the quantizer that is wrapped.
    """

    inner: "AnyEstimator"  # type: ignore[name-defined]  # resolved by the table that it is a part of

    @property
    def needs_fisher(self) -> bool:
        """Whether what is wrapped reads squared gradients."""
        needed: bool = self.inner.needs_fisher
        return needed

    @property
    def needs_full(self) -> bool:
        """Whether what is wrapped reads what only the tier `full` holds."""
        needed: bool = self.inner.needs_full
        return needed

    @property
    def allowance(self) -> Allowance | None:
        """That of what is wrapped."""
        allowance: Allowance | None = self.inner.allowance
        return allowance

    def fit_inner(self, mapped: SiteStatistics) -> Fit:
        """The wrapped quantizer; mapped statistics are those of the reservoir, never of all tokens."""
        found: Fit = self.inner.fit(mapped)
        return replace(found, source=found.source.replace(EXACT, f"reservoir of {len(mapped.rows)} tokens"))
