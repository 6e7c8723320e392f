"""Estimators of float8 and block floating-point scales, by absmax."""

from typing import Literal, final

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.block_float import LARGEST_PER_TENSOR_SCALE, BlockFloat, BlockFormat
from artifacts.quantizers.float8 import DynamicFloat8, Float8, Float8Format, largest_float8
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

_TINY = torch.finfo(torch.float32).tiny


@final
class Float8Estimator(Estimator):
    """Float8 with absmax scaling: the largest calibrated magnitude maps to the largest float8.

    Parameters
    ----------
    format : {'e4m3', 'e5m2'}
        Three bits of mantissa, or two and a wider range.
    scale : {'tensor', 'head', 'channel', 'token', 'head_token', 'one'}
        One static scale per tensor, head or channel; a dynamic scale per token, or per token and head; or a scale of 1,
        as inference servers use for a checkpoint without scales.
    """

    method: Literal["float8"] = "float8"
    format: Float8Format = "e4m3"
    scale: Literal["tensor", "head", "channel", "token", "head_token", "one"] = "tensor"

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Static scales from exact minima and maxima; other scales need no statistics."""
        shape = statistics.shape
        width = {"tensor": shape.channels, "head": shape.head_dim, "channel": 1}.get(self.scale)
        if width is None:
            return Fit(self.dynamic(shape), EXACT)
        magnitudes = _magnitudes(statistics)
        # Absmax: scale = max |x| / 448 (e4m3) maps the extreme to the last finite code, per tensor, head or channel.
        largest = magnitudes.view(-1, width).amax(dim=1).repeat_interleave(width)
        scale = _scale(largest, largest_float8(self.format))
        if self.scale == "channel":  # a constant c with the scale |c| becomes +-1, exact in float8
            scale = torch.where(_constant(statistics) & (magnitudes > 0), magnitudes, scale)
        return Fit(Float8(channels=shape.channels, format=self.format, scale=scale), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Float8 with dynamic scales per token or head, or with a scale of 1."""
        if self.scale == "one":
            return Float8(channels=shape.channels, format=self.format, scale=torch.ones(shape.channels))
        if self.scale in ("token", "head_token"):
            group_size = shape.head_dim if self.scale == "head_token" else None
            return DynamicFloat8(channels=shape.channels, format=self.format, group_size=group_size)
        raise InvalidValueError(
            f"a float8 scale for each {self.scale} is fitted; calibrate first, or use scale: token, head_token or one"
        )


@final
class BlockFloatEstimator(Estimator):
    """Block floating point: 4-bit elements with a scale per block of channels.

    Parameters
    ----------
    format : {'mxfp4', 'nvfp4'}
        Blocks of 32 channels without calibration, or blocks of 16 with a static scale for the whole site.
    """

    method: Literal["block_float"] = "block_float"
    format: BlockFormat = "mxfp4"

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Tensor scale from the exact absmax for nvfp4; mxfp4 needs no statistics."""
        shape = statistics.shape
        if self.format == "mxfp4":
            return Fit(self.dynamic(shape), EXACT)
        scale = _scale(_magnitudes(statistics).amax(dim=0, keepdim=True), LARGEST_PER_TENSOR_SCALE)
        return Fit(BlockFloat(channels=shape.channels, format=self.format, tensor_scale=scale), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Mxfp4, whose block scales are dynamic."""
        if self.format == "nvfp4":
            raise InvalidValueError("nvfp4 has a fitted scale for each site; calibrate first, or use format: mxfp4")
        return BlockFloat(channels=shape.channels, format=self.format)


def _magnitudes(statistics: SiteStatistics) -> Float32[Tensor, " channels"]:
    """Largest magnitude of each channel."""
    return torch.maximum(-statistics.tails.minimum, statistics.tails.maximum).cpu()


def _constant(statistics: SiteStatistics) -> Tensor:
    """True for channels with a single value."""
    return (statistics.tails.minimum == statistics.tails.maximum).cpu()


def _scale(magnitudes: Float32[Tensor, "..."], largest: float) -> Float32[Tensor, "..."]:
    """Scale that maps the magnitudes to `largest`; 1 where they are zero."""
    return torch.where(magnitudes > 0, (magnitudes / largest).clamp_min(_TINY), 1.0)
