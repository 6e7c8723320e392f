"""Checks for NaN and infinity with few device synchronisations: checks on a GPU are batched and read at the end."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from artifacts.errors import NonFiniteError

ErrorFactory = Callable[[int, float], NonFiniteError]
"""Function from the number of non-finite values and the largest magnitude of their source to the error."""

_Check = tuple[Int64[Tensor, ""], Float[Tensor, ""], ErrorFactory]

_PENDING: ContextVar[list[_Check] | None] = ContextVar("pending", default=None)


def expect_finite(x: Float[Tensor, "..."], source: Float[Tensor, "..."], error: ErrorFactory) -> None:
    """Raises for NaN and infinity: at once on the CPU, on other devices when `answered_together` ends.

    Parameters
    ----------
    x : Float[Tensor, "..."]
        The values.
    source : Float[Tensor, "..."]
        Values from which `x` was computed; their largest magnitude is named in the error.
    error : callable
        Makes the error. It may outlive `x` and `source` by a step of the model, and must not hold them.

    Raises
    ------
    NonFiniteError
        The result of `error`.
    """
    if not x.numel():
        return
    if not _must_be_waited_for(x):
        # aminmax reads x once and returns NaN if any value is NaN: the rare second pass only counts.
        if not all(math.isfinite(float(end)) for end in torch.aminmax(x.detach())):
            raise error(int((~torch.isfinite(x)).sum()), float(source.abs().max()))
        return
    check, pending = ((~torch.isfinite(x)).sum(), source.abs().max(), error), _PENDING.get()
    if pending is None:
        _answer([check])
    else:
        pending.append(check)


@contextmanager
def answered_together() -> Iterator[None]:
    """Defers checks inside the context to its end or to the first error; nested contexts defer to the outermost.

    Raises
    ------
    NonFiniteError
        For the first check that failed; also in place of an error that followed from it.
    """
    pending = _PENDING.get()
    if pending is not None:
        with _explained(pending):
            yield
        return
    pending = []
    token = _PENDING.set(pending)
    try:
        with _explained(pending):
            yield
        _answer(pending)
    finally:
        _PENDING.reset(token)


@contextmanager
def answered_each_step(model: nn.Module) -> Iterator[None]:
    """Defers the checks of each forward pass of the model to the end of that pass.

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
        """Drops the pending checks after an error, which is raised as it is."""
        # torch skips ordinary forward hooks when the model raises, so `end` has not run; `always_call` hooks still do.
        if open_blocks:
            _PENDING.set(None)
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
    """Runs the pending checks now, before code that non-finite values would break."""
    pending = _PENDING.get()
    if pending:
        _answer(pending)
        pending.clear()


@contextmanager
def _explained(pending: list[_Check]) -> Iterator[None]:
    """Raises a failed check in place of another error, which may have followed from the non-finite values."""
    try:
        yield
    except NonFiniteError:
        raise
    except Exception:
        _answer(pending)
        raise


def _answer(pending: list[_Check]) -> None:
    """Raises the error of the first failed check; one copy from the device brings all counts."""
    counts = torch.stack([count for count, _, _ in pending]).tolist() if pending else []
    for count, (_, largest, error) in zip(counts, pending, strict=True):
        if count:
            raise error(count, float(largest))


def _must_be_waited_for(x: Tensor) -> bool:
    """True where reading a number synchronises with the device."""
    return x.device.type != "cpu"
