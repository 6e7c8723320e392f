"""Sites: names of the places in a model where cached tensors are taken."""

import functools
import re
from dataclasses import dataclass
from typing import Literal

from artifacts.errors import InvalidValueError

Stage = Literal["pre_rope", "post_rope"]

# Predictors use the key of the same layer for a value, never the reverse: keys come first.
_ORDER = {"key": 0, "value": 1, "query": 2}
_PATTERN = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(key|value|query)(?:\.(pre_rope|post_rope))?")


@functools.total_ordering
@dataclass(frozen=True)
class Site:
    """Place in a model: a layer's keys, values or queries, before or after rotation.

    Sites sort by layer, then key, value, query: the order in which a cache fills.

    Parameters
    ----------
    layer : int
        Index of the attention layer, from 0.
    tensor : {'key', 'value', 'query'}
        Tensor at the site. Queries are observed during calibration, never cached.
    stage : {'pre_rope', 'post_rope'} or None
        Before or after the rotary embedding; None for values, which are not rotated.

    Raises
    ------
    ValueError
        If the three do not name a site.

    Examples
    --------
    >>> str(Site(3, "key", "pre_rope"))
    'layers.3.key.pre_rope'
    >>> Site.parse("layers.3.value")
    Site(layer=3, tensor='value', stage=None)
    """

    layer: int
    tensor: Literal["key", "value", "query"]
    stage: Stage | None = None

    def __post_init__(self) -> None:
        if _PATTERN.fullmatch(str(self)) is None or (self.stage is None) != (self.tensor == "value"):
            raise InvalidValueError(
                "Site: expected a layer from 0, key or query with stage pre_rope or post_rope, or value without stage; "
                f"got layer={self.layer!r}, tensor={self.tensor!r}, stage={self.stage!r}"
            )

    def __str__(self) -> str:
        return ".".join(["layers", str(self.layer), self.tensor, *([self.stage] if self.stage else [])])

    def __lt__(self, other: "Site") -> bool:
        return self._sort_key < other._sort_key

    @property
    def _sort_key(self) -> tuple[int, int, str]:
        return self.layer, _ORDER[self.tensor], self.stage or ""

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Site of a name, the inverse of `str`.

        Raises
        ------
        ValueError
            If `text` is not the name of a site.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise InvalidValueError(
                f"Site: expected a name such as layers.3.key.pre_rope or layers.3.value; got {text!r}"
            )
        layer, tensor, stage = match.groups()
        return cls(int(layer), tensor, stage)  # type: ignore[arg-type]  # the pattern admits only the literals
