"""How the attention programs are cut to the sizes and scales at hand."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.errors import MismatchError
from artifacts.quantizer import Quantizer
from simquant.kernels.language import constexpr, product_type
from simquant.kernels.sharing import Sharing
from simquant.kernels.tokens import PackedTokens, PlainTokens

BITS = (1, 2, 3, 4, 8)
"""Widths that attention unpacks."""

BLOCK = 128
"""Tokens that a program holds at a time."""

PLAIN_BLOCK = 64
"""The same where they are not packed: two programs of 16 bits then share a multiprocessor."""

_LEAST_BLOCK, _LEAST_GROUP = 16, 8
"""What the tensor cores take at least, of tokens and of query heads."""


class Geometry(NamedTuple):
    """What `packed_split` is compiled for, as constants of Triton; its docstring explains the folds.

    Parameters
    ----------
    channels, head_dim, group, group_tile, block : int
        Channels of a row, of a head, query heads of a KV head, the same as a power of two, tokens of a block.
    key_fold, value_fold : {'static', 'span', 'token', 'none'} or 'rotated'
        Where scales go.
    step_type, value_type : Triton dtype
        What is multiplied where scales are folded, and where they are not.
    """

    channels: Any
    head_dim: Any
    group: Any
    group_tile: Any
    block: Any
    key_fold: Any
    value_fold: Any
    step_type: Any
    value_type: Any

    @classmethod
    def of(cls, tokens: PackedTokens, q: Float[Tensor, "batch q_heads head_dim"]) -> "Geometry":
        """That of some packed tokens.

        Raises
        ------
        NotImplementedError
            If there is no kernel for a quantizer.
        ValueError
            If a scale spans tokens of two sequences.
        """
        head_dim, channels = q.shape[2], tokens.keys.shape[1]
        sides = [(tokens.key_quantizer, tokens.keys), (tokens.value_quantizer, tokens.values)]
        sharings = [_checked_sharing(quantizer, codes.shape[0], tokens) for quantizer, codes in sides]
        block = _block(sharings, BLOCK // 2 if _lean(tokens, q) else BLOCK)
        folds = [_fold(sharing, head_dim, block) for sharing in sharings]
        if tokens.tables is not None:
            folds[0] = "rotated"
        group = q.shape[1] * head_dim // channels
        value_type = product_type(q.dtype)
        step_type = product_type(
            torch.float32 if q.dtype == torch.float32 else torch.float16
        )  # holds codes and levels exactly
        sizes = (channels, head_dim, group, group_tile(group), block)
        return cls(*(constexpr(choice) for choice in (*sizes, *folds, step_type, value_type)))


def options(tokens: PackedTokens, q: Tensor) -> dict[str, Any]:
    """How the program is compiled."""
    return {"enable_fp_fusion": True, "num_stages": 1 if _lean(tokens, q) else 3}


def _lean(tokens: PackedTokens, q: Tensor) -> bool:
    """Wide tiles, of tables or of float32, fit the 227 KiB of shared memory only if small and not loaded ahead."""
    return tokens.tables is not None or q.dtype == torch.float32


def group_tile(group: int) -> int:
    """Query heads of a KV head, padded to what the tensor cores multiply: they idle in this kernel anyway."""
    return max(_LEAST_GROUP, power_of_two(group))


def power_of_two(n: int) -> int:
    """The least one that is not below `n`."""
    return 1 << (n - 1).bit_length()


def check(q: Tensor, packed: PackedTokens | None, exact: PlainTokens | None) -> int:
    """Number of KV heads, where all shapes fit together.

    Raises
    ------
    MismatchError
        If tokens belong to another model or batch.
    ValueError
        If there is no kernel for the size of a head.
    """
    batch, q_heads, head_dim = q.shape
    if head_dim not in (32, 64, 128, 256):
        raise ValueError(f"decode_attention: head_dim must be 32, 64, 128 or 256; got {head_dim}")
    shapes = []
    if packed is not None:
        shapes.append((packed.batch, packed.keys.shape[1] / head_dim, head_dim))
    if exact is not None:
        shapes += [(t.shape[0], t.shape[1], t.shape[3]) for t in (exact.keys, exact.values)]
        if exact.keys.shape != exact.values.shape:
            raise MismatchError(
                f"decode_attention: exact keys and values must have one shape; got {tuple(exact.keys.shape)} and "
                f"{tuple(exact.values.shape)}"
            )
    if not shapes:
        raise ValueError("decode_attention: expected packed tokens, exact tokens or both; got neither")
    kv_heads = int(shapes[0][1])
    if any(shape != (batch, kv_heads, head_dim) for shape in shapes) or not kv_heads or q_heads % kv_heads:
        raise MismatchError(
            f"decode_attention: q has {batch} sequences of {q_heads} heads of {head_dim} channels; tokens have "
            f"(batch, kv_heads, head_dim) {shapes}. Do they come from the same layer and batch?"
        )
    return kv_heads


def _checked_sharing(quantizer: Quantizer, n_rows: int, tokens: PackedTokens) -> Sharing:
    sharing = Sharing.of(quantizer, n_rows)
    bits = quantizer.spec.options["bits"]
    if bits not in BITS:
        raise NotImplementedError(f"{quantizer.label}: attention unpacks {BITS} bits; got {bits}")
    if tokens.batch > 1 and tokens.n_tokens % sharing.span:
        raise ValueError(
            f"{quantizer.label}: {tokens.batch} sequences of {tokens.n_tokens} tokens were encoded with scales over "
            f"{sharing.span} tokens, some of them over two sequences. Encode each sequence in whole groups."
        )
    return sharing


def _block(sharings: list[Sharing], block: int) -> int:
    """The most tokens that lie within one span of each side, if that is a size worth a block."""
    for span in (sharing.span for sharing in sharings if sharing.span > 1):
        within = min(block, span & -span)
        block = within if within >= _LEAST_BLOCK else block
    return block


def _fold(sharing: Sharing, head_dim: int, block: int) -> str:
    if sharing.per_row == 0:
        return "static"
    if sharing.span == 1:
        return "token" if sharing.group % head_dim == 0 else "none"
    return "span" if sharing.span % block == 0 else "none"
