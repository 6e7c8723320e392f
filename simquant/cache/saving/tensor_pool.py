"""Many tensors as few arrays."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from artifacts.storage import Array

Place = list[str | int]
"""Name of an array, first row, and number of rows: JSON values."""


class TensorPool:
    """Tensors to be stored: those of one dtype and row shape stand one after the other in one array.

    Examples
    --------
    >>> pool = TensorPool()
    >>> places = [pool.add(torch.zeros(2, 3)), pool.add(torch.ones(1, 3)), pool.add(torch.ones(4).bfloat16())]
    >>> places
    [['float32.3', 0, 2], ['float32.3', 2, 1], ['bfloat16', 0, 4]]
    >>> take(pool.arrays(), places[2])
    tensor([1., 1., 1., 1.], dtype=torch.bfloat16)
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._ends: dict[str, int] = {}

    def add(self, tensor: Tensor) -> Place:
        """Takes a tensor in, and says where it stands."""
        name = ".".join([str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape[1:])])
        start = self._ends.get(name, 0)
        self._parts.setdefault(name, []).append(tensor.detach().cpu())
        self._ends[name] = start + len(tensor)
        return [name, start, len(tensor)]

    def arrays(self) -> dict[str, Array]:
        """All tensors by the names of their arrays; numpy has no bfloat16, whose bits stand in integers."""
        found = {name: torch.cat(parts) for name, parts in self._parts.items()}
        return {name: (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy() for name, x in found.items()}


def take(arrays: Mapping[str, Array], place: Place, device: torch.device | None = None) -> Tensor:
    """The tensor at a place, in memory of its own.

    Raises
    ------
    KeyError, ValueError
        If there is none.
    """
    name, start, n_rows = str(place[0]), int(place[1]), int(place[2])
    rows = arrays[name][start : start + n_rows]
    if start < 0 or len(rows) != n_rows:
        raise ValueError(f"{name}: expected {n_rows} rows from {start} on; got {len(rows)}")
    tensor = torch.from_numpy(np.array(rows))
    return (tensor.view(torch.bfloat16) if name.startswith("bfloat16") else tensor).to(device)
