"""Whether values are finite, with few waits for a GPU: what is asked on one is answered together, at the end."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from artifacts.errors import NonFiniteError

UnsupportedLayer = Callable[[int, float], NonFiniteError]
"""The error, given how many values are not finite, and the largest magnitude of what they come from."""

_Question = tuple[Int64[Tensor, ""], Float[Tensor, ""], UnsupportedLayer]

_ASKED: ContextVar[list[_Question] | None] = ContextVar("asked", default=None)


def expect_finite(x: Float[Tensor, "..."], source: Float[Tensor, "..."], refusal: UnsupportedLayer) -> None:
    """Refuses values that are NaN or infinite: at once on the CPU, elsewhere when `answered_together` ends.

    Parameters
    ----------
    x : Float[Tensor, "..."]
        The values.
    source : Float[Tensor, "..."]
        What they come from.
    refusal : callable
        The error. It may outlive `x` and `source` by a step of the model, and must not hold them.

    Raises
    ------
    NonFiniteError
        What `refusal` makes of them.
    """
    if not x.numel():
        return
    if not _must_be_waited_for(x):
        if not all(math.isfinite(float(end)) for end in torch.aminmax(x.detach())):  # an end is NaN if any value is
            raise refusal(int((~torch.isfinite(x)).sum()), float(source.abs().max()))
        return
    question, asked = ((~torch.isfinite(x)).sum(), source.abs().max(), refusal), _ASKED.get()
    if asked is None:
        _answer([question])
    else:
        asked.append(question)


@contextmanager
def answered_together() -> Iterator[None]:
    """All that is asked inside is answered at the end, or when something fails; inside another one, at the end of that.

    Raises
    ------
    NonFiniteError
        For the first values that were not finite; also in place of an error that followed from them.
    """
    asked = _ASKED.get()
    if asked is not None:
        with _explained(asked):
            yield
        return
    asked = []
    token = _ASKED.set(asked)
    try:
        with _explained(asked):
            yield
        _answer(asked)
    finally:
        _ASKED.reset(token)


@contextmanager
def answered_each_step(model: nn.Module) -> Iterator[None]:
    """Inside the context all that one call of the model asks is answered at its end, also where that is no one's block.

    Raises
    ------
    NonFiniteError
        From the call of the model.
    """
    open_blocks: list[AbstractContextManager[None]] = []

    def begin(*_: object) -> None:
        open_blocks.append(answered_together())
        open_blocks[-1].__enter__()

    def end(*_: object) -> None:
        open_blocks.pop().__exit__(None, None, None)

    def abandon(*_: object) -> None:
        """After an error, which is raised as it is."""
        if open_blocks:
            _ASKED.set(None)
            open_blocks.clear()

    with ExitStack() as stack:
        for handle in (
            model.register_forward_pre_hook(begin),
            model.register_forward_hook(end),
            model.register_forward_hook(abandon, always_call=True),
        ):
            stack.callback(handle.remove)
        yield


def answer_now() -> None:
    """Answers what has been asked so far, before something that values which are not finite would harm."""
    asked = _ASKED.get()
    if asked:
        _answer(asked)
        asked.clear()


@contextmanager
def _explained(asked: list[_Question]) -> Iterator[None]:
    """Names the values that were not finite where an error may have followed from them."""
    try:
        yield
    except NonFiniteError:
        raise
    except Exception:
        _answer(asked)
        raise


def _answer(asked: list[_Question]) -> None:
    """Raises the first refusal; the numbers are fetched at one go."""
    counts = torch.stack([count for count, _, _ in asked]).tolist() if asked else []
    for count, (_, largest, refusal) in zip(counts, asked, strict=True):
        if count:
            raise refusal(count, float(largest))


def _must_be_waited_for(x: Tensor) -> bool:
    """Whether reading a number means that everything before it is computed first."""
    return x.device.type != "cpu"
