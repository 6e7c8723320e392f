"""Shapes of sites."""

from collections.abc import Sequence
from dataclasses import dataclass

from artifacts.sites import Site


@dataclass(frozen=True, kw_only=True)
class SiteShape:
    """Shape of a site, and the rotary embedding of its layer.

    Parameters
    ----------
    site : Site
        The site.
    heads, head_dim : int
        Heads (query heads for queries) and channels of each.
    rotary_dim : int
        Leading channels of a head that rotate; 0 without RoPE.
    interleaved : bool
        Pairs (0, 1), (2, 3), ... rather than (0, rotary_dim / 2), ...
    frequencies : sequence of float
        Radians per position of each rotary pair.
    module : str
        Path of the attention module in the model, for recipes that name it; empty if it is not known.
    """

    site: Site
    heads: int
    head_dim: int
    rotary_dim: int = 0
    interleaved: bool = False
    frequencies: Sequence[float] = ()
    module: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "frequencies", tuple(self.frequencies))  # JSON has lists only

    @property
    def channels(self) -> int:
        """Channels of a token: heads * head_dim."""
        return self.heads * self.head_dim
