"""The one place where the two layouts meet: a cache's and a calibration's."""

from jaxtyping import Float
from torch import Tensor


def to_rows(x: Float[Tensor, "batch heads tokens head_dim"]) -> Float[Tensor, "rows channels"]:
    """All tokens of a batch as rows, heads side by side; a view where memory allows it."""
    batch, heads, tokens, head_dim = x.shape
    return x.transpose(1, 2).reshape(batch * tokens, heads * head_dim)


def from_rows(
    rows: Float[Tensor, "rows channels"], like: Float[Tensor, "batch heads tokens head_dim"]
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Undoes `to_rows` for a tensor of the shape of `like`."""
    batch, heads, tokens, head_dim = like.shape
    return rows.view(batch, tokens, heads, head_dim).transpose(1, 2)
