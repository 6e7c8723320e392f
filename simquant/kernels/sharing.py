"""Addresses of scales, by one computation for every quantizer that the kernels know.

The scale of channel c of row t stands at ``(t // span) * per_row + c // group`` of what the quantizer stores.
"""

from typing import Any, NamedTuple

import torch

from artifacts.codes import Codes
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine, top_code
from artifacts.quantizers.codebook import Codebook
from artifacts.quantizers.dynamic_affine import DynamicAffine


class Sharing(NamedTuple):
    """Numbers of tokens and channels that share a scale.

    Parameters
    ----------
    span : int
        Consecutive tokens with one scale; 1 where scales are static.
    per_row : int
        Scales of one row of them; 0 where they are static: all rows read the same.
    group : int
        Consecutive channels with one scale.
    """

    span: int
    per_row: int
    group: int

    @classmethod
    def of(cls, quantizer: Quantizer) -> "Sharing":
        """That of a quantizer which `support.reads` admits."""
        if not isinstance(quantizer, DynamicAffine):
            return cls(span=1, per_row=0, group=1)
        if quantizer.per == "token":
            group = quantizer.group_size or quantizer.channels
            return cls(span=1, per_row=quantizer.channels // group, group=group)
        return cls(span=quantizer.tokens_per_scale or 1, per_row=quantizer.channels, group=1)


class Side(NamedTuple):
    """Tensors and constants of the packed keys, or of the packed values, for a program; missing tensors are None.

    Parameters
    ----------
    codes : Tensor
        As stored; as words of 32 bits unless `bits` is 3.
    scale, offset : Tensor or None
        As stored: float32 where static, else float16.
    levels : Tensor or None
        Tables of a codebook, `level_stride` (0: one for all channels) values from one channel's to the next.
    bits, centre, span, per_row, group, level_stride : constexpr
        Code width, the code that stands for zero (0 beside an offset), `Sharing`, and the stride of the tables.
    """

    codes: Any
    scale: Any
    offset: Any
    levels: Any
    bits: Any
    centre: Any
    span: Any
    per_row: Any
    group: Any
    level_stride: Any


def side(quantizer: Quantizer, codes: Codes, constexpr: Any) -> Side:
    """Tensors and constants of some tokens that `quantizer` encoded, for the programs."""
    sharing = Sharing.of(quantizer)
    found = {**quantizer.tensors(), **codes.tensors}
    levels, offset = found.get("levels"), found.get("offset")
    settings = {
        "bits": quantizer.spec.options["bits"],
        "centre": centre(quantizer),
        "level_stride": 0 if levels is None or len(levels) == 1 else levels.shape[1],
        **sharing._asdict(),
    }
    packed = found["codes"].contiguous()
    return Side(
        codes=packed if settings["bits"] == 3 else packed.view(torch.int32),
        scale=found["scale"].contiguous(),
        offset=None if offset is None else offset.contiguous(),
        levels=None if levels is None else levels.contiguous(),
        **{name: constexpr(value) for name, value in settings.items()},
    )


def centre(quantizer: Quantizer) -> int:
    """The code that stands for zero in a symmetric range; 0 where an offset is stored instead."""
    if isinstance(quantizer, Codebook) or (isinstance(quantizer, Affine) and quantizer.offset is not None):
        return 0
    if isinstance(quantizer, DynamicAffine) and not quantizer.symmetric:
        return 0
    return top_code(int(quantizer.spec.options["bits"]), symmetric=True) // 2
