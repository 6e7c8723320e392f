"""Streaming quantizer: scales from a running absmax without calibration, and more bits for outlier channels.

After the project "Real-Time Prefill KV Cache Compression" (streaming KVQuant with sink and outlier awareness). Its
sink tokens belong to the cache policy here, not to the quantizer.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Float16, Float32, UInt8
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_bits
from artifacts.coding.finite import answered_together
from artifacts.coding.packing import pack, packed_bytes, unpack
from artifacts.coding.rounding import round_outward
from artifacts.coding.span import Span
from artifacts.errors import InvalidValueError, MismatchError
from artifacts.quantizer import Context, Quantizer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StreamingState:
    """Running absmax of a sequence; a cache keeps it from one `Streaming.encode_from` to the next.

    Parameters
    ----------
    absmax : Float32[Tensor, "groups"]
        Running largest magnitude of each group of channels, in units of x; zeros before the first chunk.
    n_chunks : int
        Chunks seen so far.
    """

    absmax: Float32[Tensor, " groups"]
    n_chunks: int = 0

    def after(self, absmax: Float32[Tensor, " groups"], decay: float) -> "StreamingState":
        """State after a chunk: e' = decay * e + (1 - decay) * m, and e' = m for the first chunk."""
        # As e + (1 - decay) (m - e) a constant absmax stays the same number; the two products need not add up to it.
        running = self.absmax + (1 - decay) * (absmax - self.absmax) if self.n_chunks else absmax
        return StreamingState(absmax=running, n_chunks=self.n_chunks + 1)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Streaming(Quantizer):
    """Symmetric uniform quantizer with scales from an exponential moving average of each channel's absmax per chunk.

    With m the largest magnitude in a chunk and e the running one, the chunk included, a channel's scale is
    e / (2^(bits-1) - 1). Values beyond -2^(bits-1) .. 2^(bits-1) - 1 steps saturate (the negative side has one code
    more). Where m exceeds a threshold the channel is an outlier and is promoted for this chunk: it has `high_bits` bits
    and the scale m / (2^(high_bits-1) - 1), which holds every value.

    The scales of a chunk are stored in float16 beside its codes, so that later chunks do not change it; the scale of a
    token does depend on the later tokens of its own chunk, as `tokens_per_scale` says.

    Parameters
    ----------
    bits, high_bits : int
        Code width of normal and of promoted channels; from 2, and from `bits`, to 8.
    chunk_tokens : int
        Consecutive tokens with one set of scales, from 2. Only the last chunk of a call may be shorter.
    decay : float
        Weight of the past in the running magnitude, from 0 to below 1.
    groups : int
        Groups of consecutive channels, each with one absmax and one scale; 0 for one per channel.
    outlier_threshold_relative : float or None
        Promotes where m > outlier_threshold_relative * e; above 1, and never reached from 1 / (1 - decay) on.
    outlier_threshold_abs : float or None
        Promotes where m > outlier_threshold_abs, in units of x; positive. Without any threshold nothing is promoted.
    """

    kind: ClassVar[str] = "streaming"

    bits: int
    high_bits: int = 8
    chunk_tokens: int = 512
    decay: float = 0.9
    groups: int = 0
    outlier_threshold_relative: float | None = None
    outlier_threshold_abs: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.kind, self.bits, least=2)
        check_bits(f"{self.kind}: promoted channels", self.high_bits, least=self.bits)
        if self.chunk_tokens < 2:  # scales that depend on earlier tokens must not pass for scales of one token
            raise InvalidValueError(f"{self.kind}: chunk_tokens must be at least 2; got {self.chunk_tokens}")
        if not 0 <= self.decay < 1:
            raise InvalidValueError(f"{self.kind}: decay must be in [0, 1); got {self.decay!r}")
        _check_groups(self.groups, self.channels)
        _check_threshold("outlier_threshold_relative", self.outlier_threshold_relative, 1)
        _check_threshold("outlier_threshold_abs", self.outlier_threshold_abs, 0)

    @property
    def tokens_per_scale(self) -> int | None:
        """Tokens of a chunk."""
        return self.chunk_tokens

    @property
    def start(self) -> StreamingState:
        """The state before the first chunk of a sequence."""
        return StreamingState(absmax=torch.zeros(self._n_groups))

    def encode_from(self, x: Float[Tensor, "tokens channels"], state: StreamingState) -> tuple[Codes, StreamingState]:
        """Codes of tokens that follow those of `state`, and the state after them.

        Calls for whole chunks, one after the other from `start`, give the codes that `encode` gives for all tokens.

        Raises
        ------
        MismatchError, NonFiniteError
            As `encode`; and if the state is that of another number of groups.
        """
        with answered_together():
            self._check(x)
            return self._encode_from(x, state)

    def _encode_from(self, x: Float[Tensor, "tokens channels"], state: StreamingState) -> tuple[Codes, StreamingState]:
        if state.absmax.shape != (self._n_groups,):
            raise MismatchError(
                f"{self.label}: the state has shape {tuple(state.absmax.shape)}, this quantizer has {self._n_groups} "
                "groups of channels. Is it the state of another site?"
            )
        absmax = self._absmax(x.float())
        # The running absmax includes the current chunk, as its scale must be known when the chunk is encoded.
        states = list(accumulate(absmax, lambda past, chunk: past.after(chunk, self.decay), initial=state))
        running = torch.stack([each.absmax for each in states[1:]]) if len(absmax) else absmax
        promoted = self._promoted(absmax, running)
        return self._codes(x, self._scale(absmax, running, promoted), promoted), states[-1]

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        return self._encode_from(x, self.start)[0]

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        scale = codes.tensors["scale"].float()
        promoted = self._stored_mask(codes) if self._detects else torch.zeros_like(scale, dtype=torch.bool)
        x = torch.empty(codes.shape, device=scale.device)
        for name, bits, chosen in self._streams(promoted):
            counts = [len(chunk) * n for chunk, n in zip(self._chunks(x), chosen.sum(dim=1).tolist(), strict=True)]
            parts = codes.tensors[name].split([packed_bytes(count, bits) for count in counts])
            for chunk, kept, step, part in zip(self._chunks(x), chosen, self._by_channel(scale), parts, strict=True):
                chunk[:, kept] = _unpack_steps(part, step[kept], bits, len(chunk))
        return x

    def _absmax(self, x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "chunks groups"]:
        n_chunks = -(-len(x) // self.chunk_tokens)
        # Padding the last chunk with zeros changes no maximum of magnitudes.
        whole = torch.nn.functional.pad(x.abs(), (0, 0, 0, n_chunks * self.chunk_tokens - len(x)))
        return whole.view(n_chunks, self.chunk_tokens, self._n_groups, self._width).amax(dim=(1, 3))

    def _promoted(
        self, absmax: Float32[Tensor, "chunks groups"], running: Float32[Tensor, "chunks groups"]
    ) -> Bool[Tensor, "chunks groups"]:
        beyond = torch.zeros_like(absmax, dtype=torch.bool)
        if self.outlier_threshold_relative is not None:
            beyond |= absmax > self.outlier_threshold_relative * running
        if self.outlier_threshold_abs is not None:
            beyond |= absmax > self.outlier_threshold_abs
        return beyond

    def _scale(self, absmax: Tensor, running: Tensor, promoted: Tensor) -> Float16[Tensor, "chunks groups"]:
        ordinary, high = (2 ** (bits - 1) - 1 for bits in (self.bits, self.high_bits))
        # A promoted channel takes the absmax of its own chunk, so that nothing of it saturates.
        scale = torch.where(promoted, absmax / high, running / ordinary)
        return round_outward(scale, up=True, who=self.label, positive=True)

    def _codes(
        self,
        x: Float[Tensor, "tokens channels"],
        scale: Float16[Tensor, "chunks groups"],
        promoted: Bool[Tensor, "chunks groups"],
    ) -> Codes:
        tensors = {"scale": scale, **({"promoted": pack(promoted.to(torch.uint8), 1)} if self._detects else {})}
        steps = self._by_channel(scale.float())
        for name, bits, chosen in self._streams(promoted):
            chunks = zip(self._chunks(x), chosen, steps, strict=True)
            parts = [_pack_steps(chunk[:, kept].float(), step[kept], bits) for chunk, kept, step in chunks]
            tensors[name] = torch.cat([torch.empty(0, dtype=torch.uint8, device=x.device), *parts])
        by_mask = {name: Span(self.chunk_tokens, None) for name, _, _ in self._streams(promoted)}
        spans = {**dict.fromkeys(tensors, Span(self.chunk_tokens)), **by_mask}
        return Codes(tensors=tensors, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, spans=spans)

    def _stored_mask(self, codes: Codes) -> Bool[Tensor, "chunks groups"]:
        return unpack(codes.tensors["promoted"], 1, self._n_groups).bool()

    def _streams(self, promoted: Bool[Tensor, "chunks groups"]) -> list[tuple[str, int, Tensor]]:
        """Name, code width and channels of the two packed streams; each chunk begins at a whole byte."""
        high = self._by_channel(promoted)
        return [("codes", self.bits, ~high), ("high_codes", self.high_bits, high)]

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.chunk_tokens) if len(x) else ()

    def _by_channel(self, groups: Tensor) -> Tensor:
        return groups.repeat_interleave(self._width, dim=1)

    @property
    def _n_groups(self) -> int:
        return self.groups or self.channels

    @property
    def _width(self) -> int:
        return self.channels // self._n_groups

    @property
    def _detects(self) -> bool:
        return self.outlier_threshold_relative is not None or self.outlier_threshold_abs is not None


def _pack_steps(x: Tensor, scale: Float32[Tensor, " channels"], bits: int) -> UInt8[Tensor, " bytes"]:
    # Two's complement range -2^(b-1) .. 2^(b-1) - 1, stored with an offset of 2^(b-1).
    half = 2 ** (bits - 1)
    codes = (x / scale).round_().clamp_(-half, half - 1) + half
    return pack(codes.to(torch.uint8).reshape(1, -1), bits)[0]


def _unpack_steps(stream: UInt8[Tensor, " bytes"], scale: Float32[Tensor, " channels"], bits: int, n: int) -> Tensor:
    steps: Tensor = unpack(stream[None], bits, n * len(scale)).view(n, len(scale)).float() - 2 ** (bits - 1)
    return scale * steps


def _check_groups(groups: int, channels: int) -> None:
    if groups < 0 or (groups and channels % groups):
        fitting = (number for number in range(1, channels + 1) if channels % number == 0)
        near = min(fitting, key=lambda number: abs(number - groups))
        raise InvalidValueError(
            f"{Streaming.kind}: groups must divide the {channels} channels, or be 0 for a scale per channel; "
            f"got {groups}. Nearest that does: {near}"
        )


def _check_threshold(name: str, value: float | None, above: int) -> None:
    if value is not None and (type(value) is not float or not above < value < torch.inf):
        raise InvalidValueError(f"{Streaming.kind}: {name} must be a finite number above {above}; got {value!r:.60}")
