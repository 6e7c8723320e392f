"""Room behind tensors, so that tokens are appended to them without copying what is there."""

from collections.abc import Sequence

import torch
from torch import Tensor

_SHARE = 32
"""Room for one entry in so many: 3 % of memory that no count of bytes names, and so many copies of an entry at most."""


class Room:
    """Joins tensors along their first axis; the result of one call grows in place when it heads the next.

    What has been handed out is never changed: only entries behind it are written. Each owner has a room of its own, so
    that copies of a result grow apart.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Tensor, int]] = {}  # by address, with how many entries are taken

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What `torch.cat` gives."""
        if any(part.requires_grad for part in parts):
            return torch.cat(list(parts))
        head, n_entries = parts[0], sum(map(len, parts))
        buffer, n_taken = self._buffers.pop(head.data_ptr(), (head, 0))
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
    """Whether `head` is all that is taken of the buffer, and the others fit behind it."""
    return (
        n_taken == len(head)
        and n_entries <= len(buffer)
        and (buffer.data_ptr(), buffer.dtype, buffer.shape[1:]) == (head.data_ptr(), head.dtype, head.shape[1:])
        and (torch.is_inference_mode_enabled() or not buffer.is_inference())
    )
