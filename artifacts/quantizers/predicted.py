"""Linear prediction from earlier sites around another quantizer, which codes the residual."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Float16, Float32
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_vector
from artifacts.coding.exact_sums import on_grid
from artifacts.coding.finite import expect_finite
from artifacts.errors import InvalidValueError, MismatchError, NonFiniteError
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.wrapper import AbstractWrapper
from artifacts.sites import Site


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted(AbstractWrapper):
    """Quantizes the residual x - p of a linear prediction p = bias + u A, and adds p back after decoding.

    u concatenates the dequantized vectors of the `sources` for the same token, which a decoder has too. A is `weight`,
    or `weight` times `expansion` in low-rank form. Both are rounded by `on_grid` before use, so that the prediction of
    a token does not depend on the batch.

    Parameters
    ----------
    source_sites : str
        Names of the sources, separated by blanks; all of them earlier than the site.
    weight : Float16[Tensor, "inputs rank"]
        A, or its first factor in low-rank form; inputs are the channels of all sources.
    bias : Float32[Tensor, "channels"]
        Constant term of the prediction, in units of x.
    expansion : Float16[Tensor, "rank channels"] or None
        Second factor of A; None where `weight` is A itself.

    References
    ----------
    Predictors from the decoded layer before: arXiv 2501.19392, section 3.
    """

    kind: ClassVar[str] = "predicted"

    source_sites: str
    weight: Float16[Tensor, "inputs rank"]
    bias: Float32[Tensor, " channels"]
    expansion: Float16[Tensor, "rank channels"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vector(self.kind, "bias", self.bias, self.channels)
        if self.expansion is not None:
            _check_matrix("expansion", self.expansion, self.channels)
        _check_matrix("weight", self.weight, self.channels if self.expansion is None else len(self.expansion))
        self._check_sources()

    @property
    def sources(self) -> tuple[Site, ...]:  # type: ignore[override]  # of this quantizer, not of its class
        """Sites whose dequantized vectors are the context, in this order."""
        return tuple(Site.parse(name) for name in self.source_sites.split())

    @property
    def decode_multiply_adds(self) -> int:
        """Multiply-adds of the wrapped quantizer and of the product with A or its factors, without the sources' own."""
        factors = [self.weight] if self.expansion is None else [self.weight, self.expansion]
        return self.inner.decode_multiply_adds + sum(factor.numel() for factor in factors)

    def at(self, site: Site) -> Quantizer:
        """The same quantizer at `site`, which must come after all its sources."""
        placed = super().at(site)
        assert isinstance(placed, Predicted)
        placed._check_sources()
        return placed

    def predict(self, context: Context) -> Float32[Tensor, "tokens channels"]:
        """Prediction p for each token of the context."""
        # Closed loop, as in DPCM (Gersho and Gray, chapter 7): u is what the decoder has, so that the error of x is the
        # error of the residual alone and does not accumulate over layers. (u W) E costs rank * (inputs + channels)
        # multiply-adds a token, u (W E) inputs * channels.
        parts = self._used.split([u.shape[1] for u in context])
        first, *others = (_product(u.float(), part) for u, part in zip(context, parts, strict=True))
        p = sum(others, first)
        return self.bias + (p if self._used_expansion is None else _product(p, self._used_expansion))

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"] | None:
        """None: the range moves with the prediction and is not static."""
        return None

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        self._check_context(context, x.shape[0])
        residual = x.float() - self.predict(context)
        expect_finite(
            residual,
            x,
            lambda _, largest: NonFiniteError(
                f"{self.label}: values of up to {largest:.4g} leave the range of float32 when their prediction is "
                "subtracted. Find the layer that overflows."
            ),
        )
        inner = self.inner._encode(residual, ())
        return Codes(tensors={}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, inner=inner)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        self._check_context(context, codes.shape[0])
        return self.predict(context) + self.inner._decode(codes.inner, ())

    @cached_property
    def _used(self) -> Float32[Tensor, "inputs rank"]:
        return on_grid(self.weight.float().mT).mT

    @cached_property
    def _used_expansion(self) -> Float32[Tensor, "rank channels"] | None:
        return None if self.expansion is None else on_grid(self.expansion.float().mT).mT

    def _check_sources(self) -> None:
        if not self.sources or (self.site is not None and max(self.sources) >= self.site):
            raise InvalidValueError(
                f"{self.kind}: source_sites must name sites before {self.site}; got {self.source_sites!r:.200}"
            )

    def _check_context(self, context: Context, n_tokens: int) -> None:
        shapes = [tuple(u.shape) for u in context]
        fitting = len(shapes) == len(self.sources) and all(len(u) == 2 and u[0] == n_tokens for u in shapes)
        if not fitting or sum(u[1] for u in shapes) != len(self.weight):
            raise MismatchError(
                f"{self.label}: it is predicted from {', '.join(map(str, self.sources))}: expected their decoded "
                f"vectors of the same {n_tokens} tokens, {len(self.weight)} channels in all; got shapes {shapes}. "
                "Encode and decode the sites in order, and pass the sources as context."
            )


def _check_matrix(name: str, matrix: Float[Tensor, "..."], columns: int) -> None:
    shape = tuple(matrix.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != columns or matrix.dtype != torch.float16:
        raise InvalidValueError(
            f"predicted: {name} must be float16 with at least one row and {columns} columns; got {matrix.dtype} of "
            f"shape {shape}"
        )
    if not torch.isfinite(matrix).all():
        raise InvalidValueError(
            f"predicted: {name} must be finite; {int((~torch.isfinite(matrix)).sum())} entries are not"
        )


def _product(
    x: Float32[Tensor, "tokens terms"], matrix: Float32[Tensor, "terms channels"]
) -> Float32[Tensor, "tokens channels"]:
    # Exact in float64 on the grid, so that a token has the same prediction, and the same codes, in any batch.
    return (on_grid(x).double() @ matrix.double()).float()
