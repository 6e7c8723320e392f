"""Padding and position of the tokens of a forward pass, read from the attention mask."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from artifacts.errors import MismatchError, UnsupportedModelError
from artifacts.model.attention import AttentionLayer
from artifacts.model.transformers_release import named_arguments, parameters, passed_cache

_HIDDEN = -1e4
"""Additive mask values at or below this hide a token: weights underflow in float32; no bias is so low in all heads."""


class Tokens:
    """Tokens of the running attention module: mask of real tokens, and number of real tokens in the cache before them.

    A token is padding if its own query does not see it; the tokens before a step are those of the cache that its first
    real query sees. The mask given to attention decides alone, so that any caller of the model is treated alike.
    """

    def __init__(self) -> None:
        self.n_past = 0
        self._layer: AttentionLayer | None = None
        self._real: Bool[Tensor, "batch tokens"] | None = None
        self._before: Int64[Tensor, " batch"] | None = None
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._key: tuple[Any, ...] = ()

    @property
    def padded(self) -> bool:
        """True if some of the tokens, or of those before them, are padding."""
        return self._real is not None or self._before is not None

    def note(self, layer: AttentionLayer, mask: object, size: tuple[int, int], n_past: int) -> None:
        """Notes the mask of a step of `size` (sequences, tokens) after `n_past` columns of the cache."""
        self._layer, self.n_past = layer, n_past
        if mask is None:
            self._real = self._before = None
            self._key = ()
            return
        mask = _checked(layer, mask, size)
        # The mask is read once per step. `_version` counts in-place changes of the tensor, so that a reused buffer with
        # another content is read again; inference tensors have no version.
        key = (size, n_past, None if mask.is_inference() else mask._version)
        if self._seen() is mask and self._key == key:  # the layers of a model share one mask tensor
            return
        real, before = _read(mask, size, n_past, layer.mask_hides)
        self._real = None if real.all() else real.cpu()
        self._before = None if (before == n_past).all() else before.cpu()
        self._seen, self._key = ref(mask), key

    def real(self, batch: int, n_tokens: int) -> Bool[Tensor, "batch tokens"] | None:
        """Mask of the tokens that are not padding; None if all are real."""
        return self._real

    def encoded(self, batch: int, n_tokens: int, sink_tokens: int) -> Bool[Tensor, "batch tokens"] | None:
        """Mask of the real tokens after the first `sink_tokens` of their sequence; None if all are.

        Raises
        ------
        MismatchError
            If the mask of a sliding window does not tell.
        """
        if self._real is None and self._before is None and self.n_past >= sink_tokens:
            return None
        real = torch.ones(batch, n_tokens, dtype=torch.bool) if self._real is None else self._real
        before = torch.full((batch,), self.n_past) if self._before is None else self._before
        self._check_window(sink_tokens)
        # The position of a real token is the number of real tokens up to it, those in the cache included.
        encoded = real & (before[:, None] + real.cumsum(dim=1) > sink_tokens)
        return None if encoded.all() else encoded

    def _check_window(self, sink_tokens: int) -> None:
        assert self._layer is not None, "the attention module's hook comes first"
        window = self._layer.sliding_window
        if self._before is not None and window is not None and window <= sink_tokens:
            raise MismatchError(
                f"layers.{self._layer.layer}: expected fewer sink tokens than the sliding window of {window}, whose "
                f"mask does not tell the number of tokens before it; got {sink_tokens} sink_tokens. Use fewer, or pass "
                "texts without padding and in one piece."
            )


@contextmanager
def watch_tokens(layers: Sequence[AttentionLayer]) -> Iterator[Tokens]:
    """Context that updates `Tokens` before each call of an attention module."""
    tokens = Tokens()
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(_noting(tokens, layer), with_kwargs=True)
            stack.callback(hook.remove)
        yield tokens


def _noting(tokens: Tokens, layer: AttentionLayer) -> Callable[..., None]:
    first, *_ = parameters(layer.module)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed = named_arguments(module, args, kwargs)
        batch, n_tokens = passed[first].shape[:2]
        cache = passed_cache(passed)
        n_past = 0 if cache is None else int(cache.get_seq_length(layer.layer))
        tokens.note(layer, passed.get("attention_mask"), (batch, n_tokens), n_past)

    return note


def _read(
    mask: Tensor, size: tuple[int, int], n_past: int, hides: bool
) -> tuple[Bool[Tensor, "batch tokens"], Int64[Tensor, " batch"]]:
    """Mask of the real ones among the new tokens, and number of real tokens in the cache before them."""
    batch, n_tokens = size
    first = min(n_past, mask.shape[-1] - n_tokens)  # fewer columns with a sliding window, more with a static cache
    new, every = torch.arange(n_tokens), torch.arange(batch)
    if mask.ndim == 2:
        seen = mask.bool().expand(batch, -1)
        return seen[:, first : first + n_tokens], seen[:, :first].sum(dim=1)
    # In a causal mask token i sees column i: the diagonal of the new columns is false for padding alone, whatever a
    # sliding window hides. The first real query sees all real tokens of the cache before it, within its window.
    rows = (mask if mask.ndim == 4 else mask.unsqueeze(1)).expand(batch, -1, n_tokens, -1)
    real = _seen(rows[:, :, new, first + new], hides)  # the diagonal of the new columns
    before = _seen(rows[every, :, real.int().argmax(dim=1).cpu(), :first], hides).sum(dim=1)
    return real, before


def _checked(layer: AttentionLayer, mask: object, size: tuple[int, int]) -> Tensor:
    """The mask, if it has a shape that tells padding from text."""
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else ()
    fits = len(shape) in (2, 3, 4) and shape[0] in (1, size[0]) and shape[-1] >= size[1]
    if isinstance(mask, Tensor) and fits and (len(shape) == 2 or shape[-2] in (1, size[1])):
        return mask
    raise UnsupportedModelError(
        f"layers.{layer.layer}: expected an attention mask of {size[0]} sequences and {size[1]} tokens, (batch, "
        f"columns) or (batch, [heads,] tokens, columns); got {shape or type(mask).__name__}, which does not tell "
        "padding from text. Load the model with attn_implementation='sdpa' or 'eager'."
    )


def _seen(mask: Tensor, hides: bool) -> Bool[Tensor, "batch tokens"]:
    """Tokens that any head of a mask "batch heads tokens" shows."""
    shown = mask > _HIDDEN if mask.is_floating_point() else mask.bool() ^ hides
    return shown.any(dim=1)
