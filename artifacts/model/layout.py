"""Conversion between the cache layout and the calibration layout."""

from jaxtyping import Float
from torch import Tensor


def to_rows(x: Float[Tensor, "batch heads tokens head_dim"]) -> Float[Tensor, "rows channels"]:
    """Tokens of a batch as rows, heads side by side; a view where strides allow it."""
    # Channel c of head h becomes column h * head_dim + c: the order in which projections return channels.
    batch, heads, tokens, head_dim = x.shape
    return x.transpose(1, 2).reshape(batch * tokens, heads * head_dim)


def from_rows(
    rows: Float[Tensor, "rows channels"], like: Float[Tensor, "batch heads tokens head_dim"]
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Inverse of `to_rows`, for a tensor of the shape of `like`."""
    batch, heads, tokens, head_dim = like.shape
    return rows.view(batch, tokens, heads, head_dim).transpose(1, 2)
