"""Estimator of symmetric block quantization with a signed scale."""

from typing import Literal, final

from pydantic import Field

from artifacts.quantizer import Quantizer
from artifacts.quantizers.signed_affine import SignedAffine
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics


@final
class SignedAffineEstimator(Estimator):
    """Blocks of channels with a signed dynamic scale that represents the extreme value exactly; nothing is fitted.

    Parameters
    ----------
    bits : int
        Code width, 2 to 8.
    group_size : int
        Channels of a block; divides the channels.
    """

    method: Literal["signed_affine"] = "signed_affine"
    bits: int = Field(default=4, ge=2, le=8)
    group_size: int = Field(default=32, ge=1)

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Quantizer for the shape; needs no statistics."""
        return Fit(self.dynamic(statistics.shape), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Quantizer for the shape."""
        return SignedAffine(channels=shape.channels, bits=self.bits, group_size=self.group_size)
