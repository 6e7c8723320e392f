"""What a command has printed, and figures read from it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from scripts.claims.tables import find_tables

_PLACE = re.compile(r"((?:\[[^\]]+\])+)(?::(\.\d+[f%]))?")
_KEY = re.compile(r"\[([^\]]+)\]")


class UnreadableError(ValueError):
    """An output does not hold what a claim reads from it."""


@dataclass(frozen=True)
class Output:
    """The standard output of a command: one JSON object, or text with tables.

    Examples
    --------
    >>> Output('{"bits": {"key": 4.0, "value": 4.5}}').fill("[bits][key]:.2f / [bits][value]:.2f")
    '4.00 / 4.50'
    >>> Output("codes   KL   nats\\n4 bits  0.1  0.2").fill("[4 bits][nats]")
    '0.2'
    """

    text: str

    def fill(self, template: str) -> str:
        """A text in which each place, `[row][column]` or `[key][key]:.2f`, became what stands there.

        A key may be the beginning of one, if no other begins so.

        Raises
        ------
        UnreadableError
            If there is no such place.
        """
        return _PLACE.sub(self._at, template)

    def search(self, pattern: str) -> str:
        """The first group of a regular expression.

        Raises
        ------
        UnreadableError
            If it does not match.
        """
        match = re.search(pattern, self.text, re.MULTILINE)
        if match is None:
            raise UnreadableError(f"expected an output with {pattern!r}; got {self.text[:200]!r}")
        return match.group(1)

    @cached_property
    def _values(self) -> Mapping[str, Any]:
        if self.text.lstrip().startswith("{"):
            found: dict[str, Any] = json.loads(self.text)
            return found
        return {
            row[0]: dict(zip(table.heading, row, strict=True)) for table in find_tables(self.text) for row in table.rows
        }

    def _at(self, place: re.Match[str]) -> str:
        value: Any = self._values
        for key in _KEY.findall(place[1]):
            value = self._step(value, key)
        return format(value, place[2] or "")

    @staticmethod
    def _step(value: Any, key: str) -> Any:
        keys = list(value) if isinstance(value, Mapping) else []
        matching = [key] if key in keys else [own for own in keys if own.startswith(key)]
        if len(matching) != 1:
            raise UnreadableError(f"expected one entry [{key}] in the output; it has {', '.join(keys)[:200] or 'none'}")
        return value[matching[0]]
