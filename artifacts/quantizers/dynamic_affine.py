"""Uniform quantizers with dynamic scales, computed from the values that are encoded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Float16
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_bits, check_group
from artifacts.coding.packing import pack, unpack
from artifacts.coding.rounding import round_outward
from artifacts.coding.span import Span
from artifacts.errors import InvalidValueError
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.affine import symmetric_offset, top_code

Per = Literal["token", "channel", "tensor"]
_SHARING: dict[Per, tuple[int, ...]] = {"token": (2,), "channel": (1,), "tensor": (1, 2)}
"""Axes of the grouped values over which minimum and maximum are taken."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicAffine(Quantizer):
    """Dynamic uniform quantizer: scale and offset of each group from its minimum and maximum, stored in float16.

    Parameters
    ----------
    bits : int
        Code width, 1 to 8.
    per : {'token', 'channel', 'tensor'}
        One scale per token (reduced over its channels), per channel (reduced over tokens), or for the whole call.
        Without a group size the last two are not causal: they depend on all later tokens of the call, which a cache
        does not have, and reports say so.
    group_size : int or None
        Consecutive channels of a token, or consecutive tokens of a channel, that share a scale (arXiv 2402.02750,
        section 3.2). Groups of tokens are counted from the first token of the call; the last one may be shorter.
    symmetric : bool
        Range [-m, m] with m the largest magnitude; stores no offset.
    whole_zero_point : bool
        Round the zero point to an integer inside the code range, as integer kernels need it. A range that does not
        contain zero then saturates at its far end.
    clip_ratio : float or None
        Fraction of the range that is kept, around its middle, above 0 and below 1; values beyond saturate (arXiv
        2405.06219). None keeps the whole range.
    """

    kind: ClassVar[str] = "dynamic_affine"

    bits: int
    per: Per = "token"
    group_size: int | None = None
    symmetric: bool = False
    whole_zero_point: bool = False
    clip_ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.kind, self.bits, least=2 if self.symmetric else 1)
        if self.per not in _SHARING:
            raise InvalidValueError(f"{self.kind}: per must be one of {', '.join(_SHARING)}; got {self.per!r}")
        if self.group_size is not None:
            check_group(self.kind, self.group_size, self.channels if self.per == "token" else None)
        if self.group_size is not None and self.per == "tensor":
            raise InvalidValueError(
                f"{self.kind}: group_size needs per 'token' or 'channel'; got {self.group_size} with per 'tensor'"
            )
        if self.symmetric and self.whole_zero_point:
            raise InvalidValueError(f"{self.kind}: a symmetric range has no zero point to round; drop whole_zero_point")
        if self.clip_ratio is not None and not 0 < self.clip_ratio < 1:
            raise InvalidValueError(f"{self.kind}: clip_ratio must be above 0 and below 1; got {self.clip_ratio!r}")

    @property
    def tokens_per_scale(self) -> int | None:
        """1 for scales per token, the group size for groups of tokens, None for one scale over the whole call."""
        return 1 if self.per == "token" else self.group_size

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        spans = self.spans(len(x))
        grouped = self._grouped(x.float(), spans["scale"].tokens)
        axes = _SHARING[self.per]
        parameters = self._parameters(grouped.amin(axes, keepdim=True), grouped.amax(axes, keepdim=True))
        scale, offset = self._scale_offset(parameters)
        steps = ((grouped - offset) / scale).round_().clamp_(0, top_code(self.bits, symmetric=self.symmetric))
        codes = pack(steps.to(torch.uint8).reshape(-1, self.channels)[: x.shape[0]], self.bits)
        stored = {name: tensor.squeeze(axes) for name, tensor in parameters.items()}
        if self.per == "tensor":
            stored = {name: tensor[:, None] for name, tensor in stored.items()}
        return Codes(tensors={"codes": codes, **stored}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, spans=spans)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        steps = self._grouped(unpack(codes.tensors["codes"], self.bits, codes.shape[1]), codes.span("scale").tokens)
        last = max(_SHARING[self.per])
        scale, offset = self._scale_offset(
            {n: t.unsqueeze(1 if last == 1 else 2) for n, t in codes.tensors.items() if n != "codes"}
        )
        return steps.float().mul_(scale).add_(offset).reshape(-1, self.channels)[: codes.shape[0]]

    def spans(self, n_tokens: int) -> dict[str, Span]:
        """Span of tokens behind each stored scale and offset."""
        names = ("scale",) if self.symmetric else ("scale", "offset")
        return dict.fromkeys(names, Span(self.tokens_per_scale or max(1, n_tokens)))

    def _grouped(self, x: Tensor, size: int) -> Tensor:
        """Values in groups with one scale each: "tokens groups group" per token, else "groups group channels"."""
        if self.per == "token":
            of_tokens: Tensor = x.unflatten(1, (-1, self.group_size or self.channels))
            return of_tokens
        if len(x) % size:  # the last group is filled up with its last token, which widens no range
            x = torch.cat([x, x[-1:].expand(-len(x) % size, -1)])
        of_channels: Tensor = x.unflatten(0, (len(x) // size, size))
        return of_channels

    def _parameters(self, low: Tensor, high: Tensor) -> dict[str, Float16[Tensor, "..."]]:
        """Float16 scale and offset of each range, rounded outwards so that they hold every value not clipped."""
        # Min-max: scale = (max - min) / (2^bits - 1), offset = min (KIVI, arXiv 2402.02750, section 3.1). The scale is
        # taken from the offset as stored in float16, or the rounding of the offset would cut off the top.
        steps = 2**self.bits - 1
        if self.clip_ratio is not None:
            middle, half = (low + high) / 2, (high - low) / 2 * self.clip_ratio
            low, high = middle - half, middle + half
        if self.symmetric:
            return {"scale": self._half(torch.maximum(-low, high) / (2 ** (self.bits - 1) - 1), up=True)}
        if self.whole_zero_point:
            scale = self._half((high - low) / steps, up=True)
            # Integer zero point: min = -zero_point * scale puts an exact code on zero (arXiv 1712.05877, section 2.1).
            zero_point = torch.round(-low / scale.float()).clamp(0, steps)
            return {"scale": scale, "offset": self._half(-zero_point * scale.float(), up=False)}
        offset = self._half(low, up=False)
        return {"scale": self._half((high - offset.float()) / steps, up=True), "offset": offset}

    def _scale_offset(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        scale = parameters["scale"].float()
        return scale, symmetric_offset(scale, self.bits) if self.symmetric else parameters["offset"].float()

    def _half(self, x: Tensor, *, up: bool) -> Float16[Tensor, "..."]:
        return round_outward(x, up=up, who=self.label, positive=up)
