"""What a recipe says of the tokens that a cache keeps exact, besides the sinks."""

from typing import final

from pydantic import BaseModel, ConfigDict, Field


class _Window(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    residual_tokens: int = Field(default=0, ge=0)
    block_tokens: int = Field(default=1, ge=1)


@final
class CacheEntry(_Window):
    """How a method means its codes to be used: the fields of `simquant.CachePolicy`, which explains them.

    The protocols `decode` and `cache` follow it, and so does a packed cache that is given no policy; `full`, which has
    no window, does not.

    Parameters
    ----------
    residual_tokens, block_tokens : int
        Recent tokens that stay exact, and how many leave at once: a multiple of the quantizers' group.
    values : window or None
        Both of them for the values, where these have another window than the keys.
    exact_prefill : bool
        Whether the step that fills the cache reads exact keys and values.
    keep_smallest_norm : int
        How many smallest keys so far stay exact, with their values.
    """

    values: _Window | None = None
    exact_prefill: bool = False
    keep_smallest_norm: int = Field(default=0, ge=0)
