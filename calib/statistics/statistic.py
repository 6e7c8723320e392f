"""Base class of all statistics, and the contract of a new one.

Memory is fixed; any chunking, order or sharding of the same tokens gives the same state: integer counts exactly,
float64 sums to 1e-6 of their scale. All state is in the tensors that `STATE` names, so that saving is generic.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.errors import InvalidValueError


class Statistic(ABC):
    """Accumulator over a stream of tokens."""

    STATE: ClassVar[tuple[str, ...]]
    """Names of the tensor attributes that make up the state."""

    @abstractmethod
    def update(self, x: Float[Tensor, "tokens channels"]) -> None:
        """Accumulates tokens, which must be finite."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Adds the state of another statistic, as if its tokens had been accumulated here."""

    def state(self) -> dict[str, Tensor]:
        """State tensors by name."""
        return {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restores the output of `state`.

        Raises
        ------
        ValueError
            If a tensor is missing or has another shape or dtype.
        """
        for name, own in self.state().items():
            given = state.get(name)
            if given is None or given.shape != own.shape or given.dtype != own.dtype:
                got = "nothing" if given is None else f"{given.dtype} {tuple(given.shape)}"
                raise InvalidValueError(
                    f"{type(self).__name__}.{name}: expected {own.dtype} {tuple(own.shape)}, got {got}"
                )
            setattr(self, name, given.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.state().values())


def check_weights(statistic: Statistic, weights: Tensor | None, sums: Tensor) -> None:
    """Checks that a statistic with weights accumulates in float64.

    Raises
    ------
    RuntimeError
        If it counts in integers.
    """
    if weights is not None and sums.dtype != torch.float64:
        raise RuntimeError(
            f"{type(statistic).__name__}: weights of {weights.dtype} can't be cast to counts of {sums.dtype}. "
            "Construct it with dtype=torch.float64."
        )


def adopt_device(statistic: Statistic, device: torch.device) -> None:
    """Moves the state to the device of the activations."""
    for name, tensor in statistic.state().items():
        if tensor.device != device:
            setattr(statistic, name, tensor.to(device))
