"""Quantizing and packing new tokens on the device that holds them."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.packing import packed_bytes
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from simquant.kernels.append_programs import encode, parameters
from simquant.kernels.sharing import Sharing, centre

_EXACT = {"enable_fp_fusion": False}
"""A fused multiply-add rounds once where PyTorch rounds twice."""


def append(quantizer: Quantizer, x: Float[Tensor, "tokens channels"]) -> Codes:
    """`quantizer.encode(x)`, bit for bit, by two kernels at most.

    Parameters
    ----------
    quantizer : Affine, Codebook or DynamicAffine
        Of any width; a dynamic one per token (in groups of channels too) or per channel (in groups of tokens too).
    x : Float[Tensor, "tokens channels"]
        New tokens: float32, float16 or bfloat16.

    Raises
    ------
    ImportError
        If Triton is not installed.
    NotImplementedError
        If there is no kernel for the quantizer.
    MismatchError, NonFiniteError
        As `quantizer.encode` does.
    """
    sharing = Sharing.of(quantizer, len(x))
    if x.ndim != 2 or x.shape[1] != quantizer.channels or len(x) == 0:
        return quantizer.encode(x)  # which refuses them, or stores nothing
    x = x.contiguous()
    stored = _dynamic_parameters(quantizer, x, sharing) if isinstance(quantizer, DynamicAffine) else {}
    if not torch.stack([torch.isfinite(tensor).all() for tensor in (x, *stored.values())]).all():
        return quantizer.encode(x)  # which says what is not finite, or does not fit float16
    codes = _codes(quantizer, x, sharing, stored)
    spans = quantizer.spans(len(x)) if isinstance(quantizer, DynamicAffine) else {}
    return Codes(tensors={"codes": codes, **stored}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, spans=spans)


def _dynamic_parameters(quantizer: DynamicAffine, x: Tensor, sharing: Sharing) -> dict[str, Tensor]:
    shape = (-(-len(x) // sharing.span), sharing.per_row)
    names = ("scale",) if quantizer.symmetric else ("scale", "offset")
    stored = {name: torch.empty(shape, dtype=torch.float16, device=x.device) for name in names}
    # Neighbouring cells are neighbouring channels where a cell is a span of tokens: more cells, longer accesses.
    n_cells, block = (32, 32) if sharing.group == 1 else (4, 256)
    parameters[(-(-shape[0] * shape[1] // n_cells),)](
        x,
        stored["scale"],
        stored.get("offset"),
        quantizer.clip_ratio or 1.0,
        len(x),
        CHANNELS=quantizer.channels,
        SPAN=sharing.span,
        PER_ROW=sharing.per_row,
        GROUP=sharing.group,
        BITS=quantizer.bits,
        SYMMETRIC=quantizer.symmetric,
        WHOLE=quantizer.whole_zero_point,
        CELLS=n_cells,
        BLOCK=block,
        **_EXACT,
    )
    return stored


def _codes(quantizer: Quantizer, x: Tensor, sharing: Sharing, stored: dict[str, Tensor]) -> Tensor:
    assert isinstance(quantizer, Affine | Codebook | DynamicAffine)
    found = {**quantizer.tensors(), **stored}
    boundaries = _boundaries(quantizer) if isinstance(quantizer, Codebook) else None
    packed = torch.empty(len(x), packed_bytes(quantizer.channels, quantizer.bits), dtype=torch.uint8, device=x.device)
    tokens, octets = 4, 32
    encode[-(-len(x) // tokens), -(-quantizer.channels // (8 * octets))](
        x,
        packed,
        found["scale"],
        found.get("offset"),
        boundaries,
        len(x),
        CHANNELS=quantizer.channels,
        SPAN=sharing.span,
        PER_ROW=sharing.per_row,
        GROUP=sharing.group,
        BITS=quantizer.bits,
        CENTRE=centre(quantizer),
        BOUNDARY_STRIDE=0 if boundaries is None or len(boundaries) == 1 else boundaries.shape[1],
        TOKENS=tokens,
        OCTETS=octets,
        **_EXACT,
    )
    return packed


def _boundaries(quantizer: Codebook) -> Float32[Tensor, "tables boundaries"]:
    if quantizer.boundaries is not None:
        return quantizer.boundaries.contiguous()
    wide = quantizer.levels.float()
    return (wide[:, 1:] + wide[:, :-1]) / 2
