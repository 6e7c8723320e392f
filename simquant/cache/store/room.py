"""Growing buffers: tensors with spare capacity, so that appending tokens copies no older ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

_SHARE = 32
"""Spare capacity is 1 / 32 of a buffer: 3 % of memory beside the counted bytes."""


class Room:
    """Concatenation along the first axis into buffers with spare capacity.

    The result of one call grows in place if it is the first part of the next. A tensor that was returned never changes:
    only entries behind it are written. Each owner has a `Room` of its own, so that copies of a result grow apart.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Tensor, int]] = {}  # by address: buffer, number of used entries

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Result of `torch.cat` along the first axis."""
        if any(part.requires_grad for part in parts):
            return torch.cat(list(parts))
        head, n_entries = parts[0], sum(map(len, parts))
        buffer, n_taken = self._buffers.pop(head.data_ptr(), (head, 0))
        # A dynamic array: growth by the factor 33 / 32 copies an entry some 32 times on average while a block fills;
        # torch.cat at each decode step would copy the whole block, an entry up to 1,024 times.
        if not _can_grow(buffer, head, n_taken, n_entries):
            buffer = head.new_empty(n_entries + n_entries // _SHARE, *head.shape[1:])
            n_taken = 0
        end = n_taken
        for part in parts if not n_taken else parts[1:]:
            buffer[end : end + len(part)] = part
            end += len(part)
        self._buffers[buffer.data_ptr()] = buffer, n_entries
        return buffer[:n_entries]


def _can_grow(buffer: Tensor, head: Tensor, n_taken: int, n_entries: int) -> bool:
    """True if `head` is all that is used of the buffer, and the other entries fit behind it."""
    return (
        n_taken == len(head)
        and n_entries <= len(buffer)
        and (buffer.data_ptr(), buffer.dtype, buffer.shape[1:]) == (head.data_ptr(), head.dtype, head.shape[1:])
        and (torch.is_inference_mode_enabled() or not buffer.is_inference())
    )
