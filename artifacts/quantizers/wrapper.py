"""Base classes of quantizers that wrap another one of the same channels and change its input."""

from abc import abstractmethod
from copy import copy
from dataclasses import dataclass
from typing import final

from jaxtyping import Bool, Float, Float32
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.finite import expect_finite
from artifacts.errors import InvalidValueError, NonFiniteError
from artifacts.quantizer import Context, Quantizer
from artifacts.sites import Site


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractWrapper(Quantizer):
    """Base of wrappers; the wrapped quantizer gets float32 where its input is changed.

    Parameters
    ----------
    inner : Quantizer
        The wrapped quantizer, of the same channels.
    """

    inner: Quantizer

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, Quantizer) or self.inner.channels != self.channels:
            raise InvalidValueError(
                f"{self.kind}: inner must be a quantizer of {self.channels} channels; got {self.inner!r:.60}"
            )

    @final
    def wrapping(self, inner: Quantizer) -> "AbstractWrapper":
        """The same wrapper around another quantizer, with the cached results of its own fields."""
        # A copy keeps cached properties, such as the inverse of a basis; only `inner` needs to be validated again.
        other = copy(self)
        other.__dict__["inner"] = inner
        other.__dict__.pop("_moved", None)  # those hold what was wrapped before
        AbstractWrapper.__post_init__(other)
        return other

    @property
    def sources(self) -> tuple[Site, ...]:  # type: ignore[override]  # of this quantizer, not of its class
        """Sources of the wrapped quantizer."""
        return self.inner.sources

    @property
    def tokens_per_scale(self) -> int | None:
        """Tokens per scale of the wrapped quantizer."""
        return self.inner.tokens_per_scale

    @property
    def is_causal(self) -> bool:
        """True if the wrapped quantizer is causal."""
        return self.inner.is_causal

    @property
    def decode_multiply_adds(self) -> int:
        """Multiply-adds of the wrapped quantizer."""
        return self.inner.decode_multiply_adds

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"] | None:
        """Range check of the wrapped quantizer."""
        return self.inner.outside(x)

    def exact_tokens(self, codes: Codes) -> Bool[Tensor, " tokens"] | None:
        """Tokens that the wrapped quantizer keeps."""
        return None if codes.inner is None else self.inner.exact_tokens(codes.inner)


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractTransform(AbstractWrapper):
    """Base of invertible transforms of a token, of as many channels, that store nothing per token."""

    @abstractmethod
    def transform(self, x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """Input of the wrapped quantizer for x."""

    @abstractmethod
    def invert(self, z: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """Inverse of `transform`, applied to the dequantized z."""

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"] | None:
        """Range check of the wrapped quantizer for the transformed values."""
        return self.inner.outside(self.transform(x.float()))

    @final
    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        z = self.transform(x.float())
        expect_finite(
            z,
            x,
            lambda _, largest: NonFiniteError(
                f"{self.label}: values of up to {largest:.4g} leave the range of float32 when they are transformed. "
                "Find the layer that overflows."
            ),
        )
        dense = self.inner._encode(z, context)
        return Codes(tensors={}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, inner=dense)

    @final
    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        return self.invert(self.inner._decode(codes.inner, context))
