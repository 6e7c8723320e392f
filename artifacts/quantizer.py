"""The contract of every quantizer.

A final subclass is a frozen dataclass. Its tensor fields are what was fitted, its other fields are its configuration:
both must be plain, because `spec` and `tensors()` are read off them and are all that a file keeps. It implements
`_encode` and `_decode` for finite input of the right width, is stateless and deterministic, and `_encode` may use no
token's neighbours unless `tokens_per_scale` says so, and `Codes.spans` what they share. Nothing else has to be read to
write a quantizer.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.finite import answered_together, expect_finite
from artifacts.errors import MismatchError, NonFiniteError
from artifacts.sites import Site
from artifacts.spec import QuantSpec

Context = tuple[Tensor, ...]

RANGE_SLACK = 1 + 2.0**-10
"""By how much a value may pass the end of a fitted range and count as inside: rounding differs with the batch."""

_LARGEST_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantizer(ABC):
    """A lossy codec for the vectors of one site.

    Parameters
    ----------
    channels : int
        Width of the vectors: kv_heads * head_dim.
    site : Site or None
        Where it belongs; named in errors, set when it enters an `Artifact`.
    """

    channels: int
    site: Site | None = None

    kind: ClassVar[str]
    sources: ClassVar[tuple[Site, ...]] = ()
    """Earlier sites whose dequantized vectors of the same tokens are the context; empty for all but predictors."""

    def __post_init__(self) -> None:
        """Settings are of the very type they are declared with: a file may have been written by anyone."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (bool, int, float) and type(value) is not field.type:
                raise ValueError(f"{self.kind}: {field.name} must be of type {field.type.__name__}; got {value!r:.60}")
        if self.channels < 1:
            raise ValueError(f"{self.kind}: channels must be at least 1; got {self.channels}")

    @property
    def tokens_per_scale(self) -> int | None:
        """How many tokens share what is stored per call: 1, a group, or None for all tokens of the call."""
        return 1

    @property
    def looks_ahead(self) -> bool:
        """Whether what a token is decoded to depends on later tokens of its call."""
        return self.tokens_per_scale != 1

    @final
    def encode(self, x: Float[Tensor, "tokens channels"], context: Context = ()) -> Codes:
        """What a cache stores for the tokens `x`.

        Raises
        ------
        MismatchError
            If `x` has another number of channels.
        NonFiniteError
            If `x` holds NaN or infinity.
        """
        with answered_together():
            self._check(x)
            return self._encode(x, context)

    @final
    def decode(self, codes: Codes, context: Context = ()) -> Float[Tensor, "tokens channels"]:
        """The tokens as attention reads them back, in the dtype that was encoded; never infinite."""
        x = self._decode(codes, context)
        if x.dtype == codes.dtype:
            return x
        if codes.dtype == torch.float16:  # the last step of a range can lie beyond what float16 holds
            x = x.clamp(-_LARGEST_HALF, _LARGEST_HALF)
        return x.to(codes.dtype)

    @final
    def simulate(self, x: Float[Tensor, "tokens channels"], context: Context = ()) -> Float[Tensor, "tokens channels"]:
        """`decode(encode(x))`: bit for bit what a cache gives back."""
        return self.decode(self.encode(x, context), context)

    def _check(self, x: Float[Tensor, "tokens channels"]) -> None:
        if x.ndim != 2 or x.shape[1] != self.channels:
            raise MismatchError(
                f"{self.label}: x has shape {tuple(x.shape)}, this quantizer was fitted on tokens of {self.channels} "
                "channels. Was the artifact made for another model?"
            )
        n_values = x.numel()
        expect_finite(
            x,
            x,
            lambda n_bad, _: NonFiniteError(
                f"{self.label}: {n_bad} of {n_values} values to encode are NaN or infinite. "
                "Find the layer that overflows, or run the model with --dtype float32."
            ),
        )

    @abstractmethod
    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes: ...

    @abstractmethod
    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]: ...

    def deviation(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """How far out each value lies, to rank outliers: distance from the token's own mean."""
        return (x - x.mean(dim=1, keepdim=True)).abs()

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"] | None:
        """True where a value lies beyond the static range that was fitted; None where no range is static."""
        return None

    @property
    def label(self) -> str:
        """The site, or the kind where no site is known."""
        return str(self.site) if self.site is not None else self.kind

    @final
    @property
    def spec(self) -> QuantSpec:
        """Everything but the tensors."""
        own = {name: value for name, value in self._fields().items() if not isinstance(value, Tensor | Quantizer)}
        inner = self._fields().get("inner")
        return QuantSpec(kind=self.kind, options=own, inner=inner.spec if isinstance(inner, Quantizer) else None)

    @final
    def tensors(self) -> dict[str, Tensor]:
        """The fitted tensors by name; those of a wrapped quantizer behind `inner.`."""
        found = {}
        for name, value in self._fields().items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, Quantizer):
                found |= {f"{name}.{key}": tensor for key, tensor in value.tensors().items()}
        return found

    @property
    def static_bytes(self) -> int:
        """Bytes that are stored once, whatever the number of tokens."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def decode_multiply_adds(self) -> int:
        """Multiply-adds to decode a token from its codes: one a channel, where it is scaled and shifted."""
        return self.channels

    def to(self, device: torch.device) -> "Quantizer":
        """The same quantizer with its tensors on `device`; itself where they are there already, else one for ever."""
        if device in self._moved:
            return self._moved[device]
        held = {name: value for name, value in self._fields().items() if isinstance(value, Tensor | Quantizer)}
        moved = {name: value.to(device) for name, value in held.items()}
        if all(moved[name] is value for name, value in held.items()):
            return self
        return self._moved.setdefault(device, self.holding(**moved))

    @cached_property
    def _moved(self) -> dict[torch.device, "Quantizer"]:
        """What `to` has made: inverses, cuts and tables that are worked out there serve every context after."""
        return {}

    def at(self, site: Site) -> "Quantizer":
        """The same quantizer, and what it wraps, as the one of `site`; itself where it is that already."""
        wrapped = {name: value.at(site) for name, value in self._fields().items() if isinstance(value, Quantizer)}
        if self.site == site and all(value is getattr(self, name) for name, value in wrapped.items()):
            return self
        placed = copy.copy(self)  # with all that was worked out from its tensors
        placed.__dict__.pop("_moved", None)  # which belong to this site
        placed.__dict__.update(wrapped, site=site)
        return placed

    def __deepcopy__(self, memo: dict[int, Any]) -> "Quantizer":
        """Itself: nothing of it ever changes, so that copies of caches share it."""
        return self

    def replace(self, **changes: Any) -> "Quantizer":
        """The same quantizer with some fields changed."""
        return type(self)(**{**self._fields(), "site": self.site, **changes})

    @final
    def holding(self, **same: Any) -> "Quantizer":
        """The same quantizer with fields of the same content in place of its own, which are not checked again."""
        other = object.__new__(type(self))
        other.__dict__.update({field.name: getattr(self, field.name) for field in fields(self)} | same)
        return other

    def _fields(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "site"}
        return {name: value for name, value in values.items() if value is not None}
