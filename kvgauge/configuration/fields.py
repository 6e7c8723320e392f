"""Configurations from values by the names of options, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Configuration = TypeVar("Configuration", bound="DataclassInstance")


def filled(kind: type[Configuration], values: Mapping[str, Any]) -> Configuration:
    """A configuration with those of the values that its fields are named after; the defaults stand for the others.

    Parameters
    ----------
    kind : type
        A dataclass; fields that are dataclasses themselves are filled from the same values.
    values : mapping from str to object
        By option, with underscores: what was typed, or what a file says.

    Examples
    --------
    >>> from kvgauge.configuration.model import ModelConfig
    >>> filled(ModelConfig, {"device": "cpu", "seqlen": 512}).device
    'cpu'
    """
    own: dict[str, Any] = {}
    for field in fields(kind):
        # A type under TYPE_CHECKING is a string here, and never a configuration.
        if isinstance(field.type, type) and is_dataclass(field.type):
            own[field.name] = filled(field.type, values)
        elif values.get(field.name) is not None:  # None is an option that was not given
            own[field.name] = values[field.name]
    return kind(**own)


def values_of(config: "DataclassInstance") -> dict[str, Any]:
    """Values by option, those of the configurations inside among them."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= values_of(value) if is_dataclass(value) and not isinstance(value, type) else {field.name: value}
    return found


def given(config: "DataclassInstance", names: Sequence[str]) -> list[str]:
    """The named options that were given, as they are typed: `--task-limit`."""
    values = values_of(config)
    return [flag(name) for name in names if values[name] not in (None, False)]


def flag(name: str) -> str:
    """An option as it is typed.

    Examples
    --------
    >>> flag("task_limit")
    '--task-limit'
    """
    return f"--{name}".replace("_", "-")


def refuse_given(config: "DataclassInstance", names: Sequence[str], why: str) -> None:
    """Refuses options that would have no effect, instead of ignoring them.

    Raises
    ------
    UsageError
        If any of them is given.
    """
    found = given(config, names)
    if found:
        raise UsageError(f"{', '.join(found)}: {why}")
