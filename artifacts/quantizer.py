"""Base class of all quantizers, and the contract of a new one.

A final subclass is a frozen dataclass. Tensor fields are fitted parameters, other fields are configuration; both must
be plain, because a file stores only `spec` and `tensors()`, which are read off the fields. It implements `_encode` and
`_decode` for finite input of the right width, stateless and deterministic. `_encode` must treat tokens independently
unless `tokens_per_scale` declares a group of tokens, whose common entries `Codes.spans` describes. Nothing else has to
be read to write a quantizer.
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
from artifacts.errors import InvalidValueError, MismatchError, NonFiniteError
from artifacts.sites import Site
from artifacts.spec import QuantSpec

Context = tuple[Tensor, ...]

RANGE_SLACK = 1 + 2.0**-10
"""Factor by which a value may exceed a fitted range and still count as inside: rounding differs with the batch."""

_LARGEST_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantizer(ABC):
    """Lossy codec for the key or value vectors of one site.

    Parameters
    ----------
    channels : int
        Width of the vectors: kv_heads * head_dim.
    site : Site or None
        Site of the quantizer; named in errors, set when it enters an `Artifact`.
    """

    channels: int
    site: Site | None = None

    kind: ClassVar[str]
    sources: ClassVar[tuple[Site, ...]] = ()
    """Earlier sites whose dequantized vectors of the same tokens are the context; empty except for predictors."""

    def __post_init__(self) -> None:
        """Validates the types of settings, which may come from a file that anyone wrote."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (bool, int, float) and type(value) is not field.type:
                raise InvalidValueError(
                    f"{self.kind}: {field.name} must be of type {field.type.__name__}; got {value!r:.60}"
                )
        if self.channels < 1:
            raise InvalidValueError(f"{self.kind}: channels must be at least 1; got {self.channels}")

    @property
    def tokens_per_scale(self) -> int | None:
        """Tokens with common dynamic parameters: 1, the size of a group, or None for all tokens of the call."""
        return 1

    @property
    def is_causal(self) -> bool:
        """True if no decoded token depends on later tokens of its call."""
        return self.tokens_per_scale == 1

    @final
    def encode(self, x: Float[Tensor, "tokens channels"], context: Context = ()) -> Codes:
        """Codes of the tokens `x`, as a cache stores them.

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
        """Dequantized tokens, in the dtype that was encoded; never infinite."""
        x = self._decode(codes, context)
        if x.dtype == codes.dtype:
            return x
        if codes.dtype == torch.float16:  # outward rounding can put the last level beyond 65504
            x = x.clamp(-_LARGEST_HALF, _LARGEST_HALF)
        return x.to(codes.dtype)

    @final
    def simulate(self, x: Float[Tensor, "tokens channels"], context: Context = ()) -> Float[Tensor, "tokens channels"]:
        """`decode(encode(x))`: fake quantization, bit for bit equal to a packed cache."""
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

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Outlier score of each value: distance from the mean of its token."""
        return (x - x.mean(dim=1, keepdim=True)).abs()

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"] | None:
        """True where a value lies beyond the fitted static range; None for quantizers without one."""
        return None

    def exact_tokens(self, codes: Codes) -> Bool[Tensor, " tokens"] | None:
        """True where a token is decoded from its stored values instead of its codes; None where every one has codes."""
        return None

    @property
    def label(self) -> str:
        """Name for errors: the site, or the kind where no site is known."""
        return str(self.site) if self.site is not None else self.kind

    @final
    @property
    def spec(self) -> QuantSpec:
        """Specification: everything but the tensors."""
        own = {name: value for name, value in self._fields().items() if not isinstance(value, Tensor | Quantizer)}
        inner = self._fields().get("inner")
        return QuantSpec(kind=self.kind, options=own, inner=inner.spec if isinstance(inner, Quantizer) else None)

    @final
    def tensors(self) -> dict[str, Tensor]:
        """Fitted tensors by name; those of a wrapped quantizer have the prefix `inner.`."""
        found = {}
        for name, value in self._fields().items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, Quantizer):
                found |= {f"{name}.{key}": tensor for key, tensor in value.tensors().items()}
        return found

    @property
    def static_bytes(self) -> int:
        """Bytes of the fitted tensors, stored once for any number of tokens."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def decode_multiply_adds(self) -> int:
        """Multiply-adds to decode one token; one per channel for scale and offset."""
        return self.channels

    def to(self, device: torch.device) -> "Quantizer":
        """The same quantizer with its tensors on `device`: itself, or one cached copy per device."""
        if device in self._moved:
            return self._moved[device]
        held = {name: value for name, value in self._fields().items() if isinstance(value, Tensor | Quantizer)}
        moved = {name: value.to(device) for name, value in held.items()}
        if all(moved[name] is value for name, value in held.items()):
            return self
        return self._moved.setdefault(device, self.holding(**moved))

    @cached_property
    def _moved(self) -> dict[torch.device, "Quantizer"]:
        """Copies on other devices, kept because their cached inverses, layouts and tables are costly to compute."""
        return {}

    def at(self, site: Site) -> "Quantizer":
        """The same quantizer, with all it wraps, at `site`; itself if it is there already."""
        wrapped = {name: value.at(site) for name, value in self._fields().items() if isinstance(value, Quantizer)}
        if self.site == site and all(value is getattr(self, name) for name, value in wrapped.items()):
            return self
        placed = copy.copy(self)  # keeps the cached properties of its tensors
        placed.__dict__.pop("_moved", None)  # copies on other devices name the old site
        placed.__dict__.update(wrapped, site=site)
        return placed

    def __deepcopy__(self, memo: dict[int, Any]) -> "Quantizer":
        """Itself: quantizers are immutable, so copies of a cache use the same one."""
        return self

    def replace(self, **changes: Any) -> "Quantizer":
        """The same quantizer with some fields changed."""
        return type(self)(**{**self._fields(), "site": self.site, **changes})

    @final
    def holding(self, **same: Any) -> "Quantizer":
        """The same quantizer with some fields replaced by equal content, without validation."""
        # Skips __init__ and __post_init__: validation reads values, which would synchronise with a GPU.
        other = object.__new__(type(self))
        other.__dict__.update({field.name: getattr(self, field.name) for field in fields(self)} | same)
        return other

    def _fields(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "site"}
        return {name: value for name, value in values.items() if value is not None}
