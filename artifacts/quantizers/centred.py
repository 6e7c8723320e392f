"""Mean subtraction per channel, around another quantizer."""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float, Float32
from torch import Tensor

from artifacts.coding.checks import check_vector
from artifacts.quantizers.wrapper import AbstractTransform


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Centred(AbstractTransform):
    """Quantizes x - mean and adds `restored` to the dequantized result.

    `restored` differs from `mean` where a mean error is corrected. Attention weights sum to one, so adding c to every
    decoded value adds c to the attention output, times the weight on decoded tokens: with restored = mean + E[x - x'],
    x' being the reconstruction without the correction, the mean error of the values vanishes from the output.

    Parameters
    ----------
    mean : Float32[Tensor, "channels"]
        Mean of each channel, subtracted before encoding, in units of x.
    restored : Float32[Tensor, "channels"] or None
        Offset of each channel, added after decoding, in units of x; None for the mean.
    """

    kind: ClassVar[str] = "centred"

    mean: Float32[Tensor, " channels"]
    restored: Float32[Tensor, " channels"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vector(self.kind, "mean", self.mean, self.channels)
        if self.restored is not None:
            check_vector(self.kind, "restored", self.restored, self.channels)

    def transform(self, x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """x - mean."""
        return x - self.mean

    def invert(self, z: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """z + restored."""
        # With restored = mean the transform is exactly undone up to rounding; a bias correction differs on purpose.
        return z + (self.mean if self.restored is None else self.restored)

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Outlier score of the wrapped quantizer for x - mean."""
        return self.inner.outlier_score(x - self.mean)
