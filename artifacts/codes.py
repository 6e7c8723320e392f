"""What a quantizer stores for some tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Encoded tokens: the very bytes that a packed cache holds.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Packed codes and the parameters of this call (scales, outliers, ...), by name.
    shape : tuple[int, int]
        Tokens and channels of what was encoded.
    dtype : torch.dtype
        Dtype of what was encoded and will be decoded.
    inner : Codes or None
        What the wrapped quantizer of a wrapper stored.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    inner: "Codes | None" = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, scales and indices included."""
        own = sum(tensor.nbytes for tensor in self.tensors.values())
        return own + (0 if self.inner is None else self.inner.nbytes)
