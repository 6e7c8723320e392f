"""Specification of a quantizer: its kind and settings, without its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from artifacts.errors import InvalidValueError

Option = int | float | bool | str

_FORMAT_BITS: Mapping[object, Option] = {"e4m3": 8, "e5m2": 8, "mxfp4": 4, "nvfp4": 4}
"""Code width of each floating-point format."""


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Specification of a quantizer: all that is needed to rebuild it but its tensors, as JSON both ways.

    Parameters
    ----------
    kind : str
        Name of the quantizer class in the closed table `artifacts.registry.KINDS`.
    options : Mapping[str, int | float | bool | str]
        Settings of the class by name, such as `bits` and `channels`.
    inner : QuantSpec or None
        Specification of the wrapped quantizer, for a wrapper.

    Raises
    ------
    ValueError
        If `kind` is no name or an option is not a plain JSON value.

    Examples
    --------
    >>> spec = QuantSpec(kind="affine", options={"bits": 3, "channels": 64})
    >>> QuantSpec.from_json(spec.to_json()) == spec
    True
    """

    kind: str
    options: Mapping[str, Option] = field(default_factory=dict)
    inner: "QuantSpec | None" = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not self.kind.isidentifier():
            raise InvalidValueError(f"QuantSpec: kind must be a name such as 'affine'; got {self.kind!r}")
        for name, value in self.options.items():
            if not isinstance(name, str) or not isinstance(value, Option):
                raise InvalidValueError(f"QuantSpec: option {name!r} must be a number, a bool or a text; got {value!r}")
        object.__setattr__(self, "options", MappingProxyType(dict(sorted(self.options.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle support: a mapping proxy can be neither pickled nor copied, its JSON can."""
        return type(self).from_json, (self.to_json(),)

    def to_json(self) -> dict[str, Any]:
        """Specification as JSON values."""
        inner = {} if self.inner is None else {"inner": self.inner.to_json()}
        return {"kind": self.kind, "options": dict(self.options), **inner}

    @classmethod
    def from_json(cls, data: object) -> "QuantSpec":
        """Specification from the output of `to_json`.

        Raises
        ------
        ValueError
            If `data` has another shape.
        """
        if not isinstance(data, dict) or not {"kind", "options"} <= set(data) <= {"kind", "options", "inner"}:
            raise InvalidValueError(
                f"QuantSpec: expected an object with kind, options and at most inner; got {data!r:.200}"
            )
        if not isinstance(data["options"], dict):
            raise InvalidValueError(f"QuantSpec: options must be an object; got {data['options']!r:.200}")
        inner = cls.from_json(data["inner"]) if "inner" in data else None
        return cls(kind=data["kind"], options=data["options"], inner=inner)

    @property
    def bits(self) -> float:
        """Code width of the innermost quantizer, a mean where widths differ; 16 means full precision.

        Raises
        ------
        ValueError
            If the option is not a number from 0 to 16.
        """
        if self.inner is not None:
            return self.inner.bits
        # Kinds without `bits` store 16-bit values (identity), except floating-point formats, which imply their width.
        bits = _FORMAT_BITS.get(self.options.get("format"), self.options.get("bits", 16))
        if isinstance(bits, bool | str) or not 0 <= bits <= 16:
            raise InvalidValueError(f"{self.kind}: bits must be a number from 0 to 16; got {bits!r:.60}")
        return float(bits)

    def describe(self) -> str:
        """Short text for tables, such as `percentile_sparse(outlier_fraction=0.01) of codebook(bits=3)`."""
        shown = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self._shown())
        own = f"{self.kind}({shown})" if shown else self.kind
        return own if self.inner is None else f"{own} of {self.inner.describe()}"

    def _shown(self) -> list[tuple[str, Option]]:
        """Options for `describe`: without those that follow from the model, and flags that are off."""
        hidden = ("channels", "source_sites")
        return [(name, value) for name, value in self.options.items() if name not in hidden and value is not False]
