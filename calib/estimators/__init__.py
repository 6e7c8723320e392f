"""The closed table of estimators: a recipe can name these and nothing else."""

from typing import Annotated

from pydantic import Field

from calib.estimators.codebook import CodebookEstimator
from calib.estimators.estimator import Estimator, Fit, Outliers
from calib.estimators.identity import IdentityEstimator
from calib.estimators.uniform import UniformEstimator

AnyEstimator = Annotated[IdentityEstimator | UniformEstimator | CodebookEstimator, Field(discriminator="method")]

__all__ = ["AnyEstimator", "CodebookEstimator", "Estimator", "Fit", "IdentityEstimator", "Outliers", "UniformEstimator"]
