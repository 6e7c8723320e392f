"""Streaming quantizers with a running state from call to call, also inside wrappers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.streaming import Streaming, StreamingState


def first_state(quantizer: Quantizer) -> StreamingState | None:
    """Running state of a sequence before its first token; None for a quantizer without one."""
    return next((one.start for one in _nested(quantizer) if isinstance(one, Streaming)), None)


def encode_from(
    quantizer: Quantizer, x: Float[Tensor, "tokens channels"], state: StreamingState
) -> tuple[Codes, StreamingState]:
    """Codes of tokens that follow those of `state`, and the state after them.

    Calls for whole chunks, one after the other from `first_state`, give the codes of one call for all tokens: wrappers
    of a `Streaming` treat each token by itself, so only the innermost quantizer carries state.

    Raises
    ------
    MismatchError, NonFiniteError
        As `Streaming.encode_from`.
    """
    if isinstance(quantizer, Streaming):
        return quantizer.encode_from(x, state)
    # Wrappers call `_encode` of what they wrap: replace the innermost quantizer by one that records the new state.
    states = [state]
    return _going_on(quantizer, states).encode(x), states[-1]


def _nested(quantizer: Quantizer) -> Iterator[Quantizer]:
    """The quantizer and all quantizers inside it."""
    yield quantizer
    for value in vars(quantizer).values():
        if isinstance(value, Quantizer):
            yield from _nested(value)


def _going_on(quantizer: Quantizer, states: list[StreamingState]) -> Quantizer:
    """The same quantizer, whose innermost continues from the last state and appends the next."""
    if isinstance(quantizer, Streaming):
        return _Running(channels=quantizer.channels, site=quantizer.site, inner=quantizer, states=states)
    wrapped = {name: value for name, value in vars(quantizer).items() if isinstance(value, Quantizer)}
    return quantizer.holding(**{name: _going_on(value, states) for name, value in wrapped.items()})


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Running(Quantizer):
    """`Streaming` that continues from a state, for one call."""

    kind: ClassVar[str] = "running"

    inner: Streaming
    states: list[StreamingState] = field(default_factory=list)

    @property
    def tokens_per_scale(self) -> int | None:
        return self.inner.tokens_per_scale

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        codes, state = self.inner.encode_from(x, self.states[-1])
        self.states.append(state)
        return codes

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        return self.inner._decode(codes, context)

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        return self.inner.outlier_score(x)
