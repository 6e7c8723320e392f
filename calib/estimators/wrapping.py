"""Base class of estimators of wrappers, with the estimator of the wrapped quantizer."""

from dataclasses import replace

from pydantic import model_validator

from artifacts.errors import InvalidValueError
from calib.estimators.estimator import EXACT, Allowance, Estimator, Fit
from calib.statistics.site_statistics import SiteStatistics


class WrappingEstimator(Estimator):
    """Base of estimators that transform tokens, fit another estimator to the result, and wrap its quantizer.

    Parameters
    ----------
    inner : estimator
        Estimator of the wrapped quantizer.
    """

    inner: "AnyEstimator"  # type: ignore[name-defined]  # resolved by the table that it is a part of

    @model_validator(mode="after")
    def _possible_inside(self) -> "WrappingEstimator":
        # First tokens, to whose norms others are compared, are not transformed with the reservoir.
        if self.inner.method == "exact_sinks":
            raise InvalidValueError("exact_sinks goes around all other methods of a site; got it inside another")
        return self

    @property
    def needs_fisher(self) -> bool:
        """True if the inner fit needs squared gradients."""
        needed: bool = self.inner.needs_fisher
        return needed

    @property
    def needs_full(self) -> bool:
        """True if the inner fit needs statistics of the tier `full`."""
        needed: bool = self.inner.needs_full
        return needed

    @property
    def allowance(self) -> Allowance | None:
        """Bit allowance of the inner estimator."""
        allowance: Allowance | None = self.inner.allowance
        return allowance

    def fit_inner(self, mapped: SiteStatistics) -> Fit:
        """Inner fit to transformed statistics, which are those of the reservoir and never of all tokens."""
        found: Fit = self.inner.fit(mapped)
        return replace(found, source=found.source.replace(EXACT, f"reservoir of {len(mapped.rows)} tokens"))
