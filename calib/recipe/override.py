"""Overrides: changes to the entries of a recipe in some layers."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from artifacts.errors import InvalidValueError
from calib.estimators import AnyEstimator
from calib.recipe.patterns import Patterns

CachedTensor = Literal["key", "value"]

Changes = Annotated[dict[str, Any], AnyEstimator]
"""Some hyper-parameters of an estimator; the annotation lets error messages list the valid ones."""


_EXACT = {"method": "identity"}


@final
class Override(BaseModel):
    """Change of hyper-parameters at some sites.

    Parameters
    ----------
    layers : tuple of int or None
        Layer numbers from 0, or backwards from -1 for the last.
    sites : tuple of str or None
        Globs over names of modules, layers and sites; exactly one of `layers` and `sites` must be given.
    key, value : mapping or None
        Changed hyper-parameters; all of them if `method` is among them. `bits: 16` means full precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    sites: Annotated[Patterns, Field(min_length=1)] | None = None
    key: Changes | None = None
    value: Changes | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Override":
        if (self.layers is None) == (self.sites is None):
            raise InvalidValueError("give exactly one of layers and sites, such as layers: [0, -1]")
        if not self.tensors:
            raise InvalidValueError("give changes for key or value, such as key: {bits: 8}")
        return self

    @property
    def tensors(self) -> list[CachedTensor]:
        """Tensors that the override changes."""
        return [tensor for tensor in ("key", "value") if getattr(self, tensor) is not None]

    def applied(self, tensor: CachedTensor, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Entry of an estimator with the changes applied."""
        changes: dict[str, Any] = getattr(self, tensor) or {}
        return merged({tensor: entry}, {tensor: changes})[tensor] if changes.get("bits") != 16 else _EXACT


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with changes applied at any depth.

    An entry with `method` replaces the old one. A setting that a wrapper lacks and its `inner` entry has goes to the
    inner entry.

    Examples
    --------
    >>> merged({"key": {"method": "uniform", "bits": 4}, "name": "a"}, {"key": {"bits": 3}})
    {'key': {'method': 'uniform', 'bits': 3}, 'name': 'a'}
    """
    found = dict(base)
    for name, change in changes.items():
        old = found.get(name)
        if isinstance(old, Mapping) and isinstance(change, Mapping) and "method" not in change:
            found[name] = merged(old, change)
        elif _is_meant_for_inner(found, name):
            found["inner"] = merged(found["inner"], {name: change})
        else:
            found[name] = change
    return found


def _is_meant_for_inner(entry: Mapping[str, Any], name: str) -> bool:
    inner = entry.get("inner")
    return name not in entry and isinstance(inner, Mapping) and (name in inner or _is_meant_for_inner(inner, name))
