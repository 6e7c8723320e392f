"""Identity quantizer: full precision."""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizer import Context, Quantizer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Identity(Quantizer):
    """Stores x in full precision, on the same code path as every other quantizer."""

    kind: ClassVar[str] = "identity"

    @property
    def decode_multiply_adds(self) -> int:
        """0: nothing is computed."""
        return 0

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        return Codes(tensors={"values": x}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        return codes.tensors["values"]
