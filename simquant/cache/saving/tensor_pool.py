"""Pool of many small tensors in a few arrays."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.storage import Array

Place = list[str | int]
"""Place of a tensor in the pool, in JSON values: name of an array, first row, number of rows."""


class TensorPool:
    """Tensors to be saved: those of one dtype and row shape are concatenated in one array.

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
        """Adds a tensor, and returns its place."""
        # safetensors stores a name, dtype and shape for each array: a cache of thousands of blocks, each with several
        # small tensors, becomes one array for each dtype and row shape.
        name = ".".join([str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape[1:])])
        start = self._ends.get(name, 0)
        self._parts.setdefault(name, []).append(tensor.detach().cpu())
        self._ends[name] = start + len(tensor)
        return [name, start, len(tensor)]

    def arrays(self) -> dict[str, Array]:
        """Arrays of all tensors, by name; bfloat16, which numpy lacks, is stored as int16 bits."""
        found = {name: torch.cat(parts) for name, parts in self._parts.items()}
        return {name: (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy() for name, x in found.items()}


def take(arrays: Mapping[str, Array], place: Place, device: torch.device | None = None) -> Tensor:
    """Copy of the tensor at a place.

    Raises
    ------
    KeyError, ValueError
        If the pool has no such place.
    """
    # Places come from a file: check them, as slicing beyond the end of an array returns fewer rows without an error.
    name, start, n_rows = str(place[0]), int(place[1]), int(place[2])
    rows = arrays[name][start : start + n_rows]
    if start < 0 or len(rows) != n_rows:
        raise InvalidValueError(f"{name}: expected {n_rows} rows from {start} on; got {len(rows)}")
    tensor = torch.from_numpy(np.array(rows))
    return (tensor.view(torch.bfloat16) if name.startswith("bfloat16") else tensor).to(device)
