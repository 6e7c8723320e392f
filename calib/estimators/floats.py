"""Scales of floating-point formats, from the largest magnitudes."""

from typing import Literal, final

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.block_float import LARGEST_PER_TENSOR_SCALE, BlockFloat, BlockFormat
from artifacts.quantizers.float8 import DynamicFloat8, Float8, Float8Format, largest_float8
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.statistics.site_statistics import SiteShape, SiteStatistics

_TINY = torch.finfo(torch.float32).tiny


@final
class Float8Estimator(Estimator):
    """Eight-bit floating point, its largest value at the largest magnitude that was seen.

    Parameters
    ----------
    format : {'e4m3', 'e5m2'}
        Three bits of mantissa, or two and a wider range.
    scale : {'tensor', 'head', 'channel', 'token', 'head_token', 'one'}
        What shares a static scale; or a scale of each token, or of each of its heads, found when it is encoded; or no
        scale, as servers run a checkpoint that has none.
    """

    method: Literal["float8"] = "float8"
    format: Float8Format = "e4m3"
    scale: Literal["tensor", "head", "channel", "token", "head_token", "one"] = "tensor"

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads the ends of the channels for a static scale, otherwise nothing."""
        shape = statistics.shape
        sharing = {"tensor": shape.channels, "head": shape.head_dim, "channel": 1}.get(self.scale)
        if sharing is None:
            return Fit(self.dynamic(shape), EXACT)
        magnitudes = _magnitudes(statistics)
        largest = magnitudes.view(-1, sharing).amax(dim=1).repeat_interleave(sharing)
        scale = _scale(largest, largest_float8(self.format))
        if self.scale == "channel":  # a constant over itself is 1, which comes back exactly
            scale = torch.where(_constant(statistics) & (magnitudes > 0), magnitudes, scale)
        return Fit(Float8(channels=shape.channels, format=self.format, scale=scale), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """A scale for each token or for each of its heads, or none at all."""
        if self.scale == "one":
            return Float8(channels=shape.channels, format=self.format, scale=torch.ones(shape.channels))
        if self.scale in ("token", "head_token"):
            group_size = shape.head_dim if self.scale == "head_token" else None
            return DynamicFloat8(channels=shape.channels, format=self.format, group_size=group_size)
        raise ValueError(
            f"a float8 scale for each {self.scale} is fitted; calibrate first, or use scale: token, head_token or one"
        )


@final
class BlockFloatEstimator(Estimator):
    """Four-bit floating point in blocks of channels.

    Parameters
    ----------
    format : {'mxfp4', 'nvfp4'}
        Blocks of 32 channels, which need no calibration; or of 16, under a static scale for the whole site.
    """

    method: Literal["block_float"] = "block_float"
    format: BlockFormat = "mxfp4"

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads the largest magnitude for nvfp4, nothing for mxfp4."""
        shape = statistics.shape
        if self.format == "mxfp4":
            return Fit(self.dynamic(shape), EXACT)
        scale = _scale(_magnitudes(statistics).amax(dim=0, keepdim=True), LARGEST_PER_TENSOR_SCALE)
        return Fit(BlockFloat(channels=shape.channels, format=self.format, tensor_scale=scale), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Blocks of mxfp4, whose scales come from the values that are encoded."""
        if self.format == "nvfp4":
            raise ValueError("nvfp4 has a fitted scale for each site; calibrate first, or use format: mxfp4")
        return BlockFloat(channels=shape.channels, format=self.format)


def _magnitudes(statistics: SiteStatistics) -> Float32[Tensor, " channels"]:
    """Largest magnitude of each channel."""
    return torch.maximum(-statistics.tails.minimum, statistics.tails.maximum).cpu()


def _constant(statistics: SiteStatistics) -> Tensor:
    """Channels that never change."""
    return (statistics.tails.minimum == statistics.tails.maximum).cpu()


def _scale(magnitudes: Float32[Tensor, "..."], largest: float) -> Float32[Tensor, "..."]:
    """What brings `largest` to the magnitudes; 1 where all is zero."""
    return torch.where(magnitudes > 0, (magnitudes / largest).clamp_min(_TINY), 1.0)
