"""Registry of estimators, a closed table: a recipe can name these methods only."""

from typing import Annotated

from pydantic import Field

from calib.estimators.centred import CentredEstimator
from calib.estimators.codebook import CodebookEstimator
from calib.estimators.compact_sparse import CompactSparseEstimator
from calib.estimators.entropy_coded import EntropyCodedEstimator
from calib.estimators.estimator import Allowance, Estimator, Fit
from calib.estimators.exact_sinks import ExactSinksEstimator
from calib.estimators.floats import BlockFloatEstimator, Float8Estimator
from calib.estimators.hadamard import HadamardEstimator
from calib.estimators.identity import IdentityEstimator
from calib.estimators.mixed_codebook import MixedCodebookEstimator
from calib.estimators.normalised import NormalisedEstimator
from calib.estimators.outliers import Outliers
from calib.estimators.predicted import PredictedEstimator
from calib.estimators.rotated import RotatedEstimator
from calib.estimators.signed_affine import SignedAffineEstimator
from calib.estimators.streaming import StreamingEstimator
from calib.estimators.uniform import UniformEstimator

AnyEstimator = Annotated[
    IdentityEstimator
    | UniformEstimator
    | SignedAffineEstimator
    | CodebookEstimator
    | MixedCodebookEstimator
    | EntropyCodedEstimator
    | Float8Estimator
    | BlockFloatEstimator
    | StreamingEstimator
    | CompactSparseEstimator
    | CentredEstimator
    | NormalisedEstimator
    | HadamardEstimator
    | RotatedEstimator
    | PredictedEstimator
    | ExactSinksEstimator,
    Field(discriminator="method"),
]

for _wrapping in (
    CompactSparseEstimator,
    CentredEstimator,
    NormalisedEstimator,
    HadamardEstimator,
    RotatedEstimator,
    PredictedEstimator,
    ExactSinksEstimator,
):
    _wrapping.model_rebuild(_types_namespace={"AnyEstimator": AnyEstimator})

__all__ = [
    "Allowance",
    "AnyEstimator",
    "BlockFloatEstimator",
    "CentredEstimator",
    "CodebookEstimator",
    "CompactSparseEstimator",
    "EntropyCodedEstimator",
    "Estimator",
    "ExactSinksEstimator",
    "Fit",
    "Float8Estimator",
    "HadamardEstimator",
    "IdentityEstimator",
    "MixedCodebookEstimator",
    "NormalisedEstimator",
    "Outliers",
    "PredictedEstimator",
    "RotatedEstimator",
    "SignedAffineEstimator",
    "StreamingEstimator",
    "UniformEstimator",
]
