"""Devices and quantizers for which there are kernels."""

import os
from functools import cache
from importlib import util

import torch

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook
from artifacts.quantizers.dynamic_affine import DynamicAffine

BITS = (1, 2, 3, 4, 8)
"""Code widths that attention unpacks."""

HEAD_DIMS = (32, 64, 128, 256)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_on(device: torch.device) -> bool:
    """True if kernels are asked for by KVGAUGE_KERNELS=1, and the device is CUDA with Triton or Triton's interpreter.

    They are not the default while no GPU has run them: they multiply in the dtype of the queries where torch widens to
    float32, so figures would move in silence.

    Raises
    ------
    InvalidValueError
        If they are asked for on such a device and Triton is not installed.
    """
    if os.environ.get("KVGAUGE_KERNELS") != "1":
        return False
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if not _has_triton():
        raise InvalidValueError(
            "KVGAUGE_KERNELS=1: kernels need Triton, which is not installed; pip install 'kvgauge[triton]', or unset it"
        )
    return True


@cache  # each layer asks at every step
def _has_triton() -> bool:
    return util.find_spec("triton") is not None


def reads(quantizer: Quantizer) -> bool:
    """True if attention reads the codes of a quantizer: affine, codebook, or dynamic per token or group of tokens."""
    if isinstance(quantizer, Codebook):  # other numbers of levels are packed in mixed radix
        return quantizer.bits in BITS and quantizer.levels.shape[1] == 2**quantizer.bits
    if isinstance(quantizer, DynamicAffine):
        return quantizer.bits in BITS and quantizer.per != "tensor" and quantizer.tokens_per_scale is not None
    return isinstance(quantizer, Affine) and quantizer.bits in BITS
