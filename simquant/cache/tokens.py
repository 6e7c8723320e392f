"""Which sequence position each token of a forward pass has, and which tokens are padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn


class Tokens:
    """The tokens of the forward pass that is running; None stands for 'every token'."""

    def __init__(self) -> None:
        self.mask: Bool[Tensor, "batch tokens"] | None = None
        self.n_past = 0

    def note(self, mask: Tensor | None, n_past: int) -> None:
        """Takes down what the model was called with; the mask covers past and new tokens."""
        self.n_past = n_past
        padded = mask is not None and mask.ndim == 2 and not bool(mask.bool().all())
        self.mask = mask.bool().cpu() if mask is not None and padded else None

    def real(self, batch: int, n_tokens: int) -> Bool[Tensor, "batch tokens"] | None:
        """Tokens that are not padding."""
        return None if self.mask is None else self.mask[:, -n_tokens:].expand(batch, -1)

    def encoded(self, batch: int, n_tokens: int, sink_tokens: int) -> Bool[Tensor, "batch tokens"] | None:
        """Real tokens at or after position `sink_tokens` of their sequence."""
        if self.mask is None and self.n_past >= sink_tokens:
            return None
        positions = self._positions(batch, n_tokens)
        late = positions >= sink_tokens
        real = self.real(batch, n_tokens)
        return late if real is None else late & real

    def _positions(self, batch: int, n_tokens: int) -> Int64[Tensor, "batch tokens"]:
        if self.mask is None:
            return torch.arange(self.n_past, self.n_past + n_tokens).expand(batch, -1)
        return (self.mask.long().cumsum(dim=1) - 1)[:, -n_tokens:].expand(batch, -1)


@contextmanager
def watch_tokens(model: nn.Module) -> Iterator[Tokens]:
    """Keeps `Tokens` up to date whenever the model is called inside the context."""
    tokens = Tokens()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        cache = kwargs.get("past_key_values")
        n_past = 0 if cache is None else int(cache.get_seq_length())
        tokens.note(mask if isinstance(mask, Tensor) else None, n_past)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()
