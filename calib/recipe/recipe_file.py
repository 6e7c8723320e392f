"""Reader of recipe files: plain values with their line numbers."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from artifacts.storage import SUFFIXES
from calib.recipe.errors import Location, Marks, RecipeError, nearest

_SHIPPED = resources.files("calib") / "recipes"

_LARGEST_BYTES, _MOST_ENTRIES = 2**20, 10_000
"""Limits far above any recipe: a larger file is something else, or has anchors that multiply each other."""

_COLLECTIONS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq")}
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


@dataclass(frozen=True)
class Document:
    """Content of a recipe file.

    Parameters
    ----------
    where : str
        Name of a shipped recipe, or path of the file.
    data : Any
        Plain values.
    marks : Marks
        File and line of each entry.
    """

    where: str
    data: Any
    marks: Marks

    def part(self, location: Location) -> "Document":
        """Entry or item at a location, as a document of its own."""
        data = self.data
        for name in location:
            data = data[name]
        depth = len(location)
        marks = {place[depth:]: line for place, line in self.marks.items() if place[:depth] == location}
        return Document(self.where, data, marks)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(Path(entry.name).stem for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def read_document(name: str) -> Document:
    """Content of a shipped recipe or a file.

    Raises
    ------
    RecipeError
        If there is no such recipe or file, or it is not plain YAML; with the line, if known.
    """
    shipped = name in shipped_recipes()
    content = (_SHIPPED / f"{name}.yaml").read_bytes() if shipped else _content(Path(name))
    return parse_document(content, name)


def parse_document(content: bytes, where: str) -> Document:
    """Content of a recipe file from its bytes.

    Raises
    ------
    RecipeError
        If they are not plain YAML.
    """
    if len(content) > _LARGEST_BYTES:
        raise RecipeError(f"recipe {where}: expected a file of at most {_LARGEST_BYTES} bytes; got a larger one")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {where}: expected UTF-8 text; got a binary file") from error
    try:
        reader = _Reader(text, where)
        return Document(where, reader.read(), {(): f"{where}, line 1", **reader.marks})
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_broken(where, text, error)) from error
    except yaml.YAMLError as error:  # a character that is none of a text
        raise RecipeError(f"recipe {where}: expected text; got a binary file") from error
    except RecursionError as error:
        raise RecipeError(f"recipe {where}: expected a few levels of nesting; got too many") from error


def _content(path: Path) -> bytes:
    """Bytes of a file, read only one beyond the size limit."""
    if path.is_dir():
        found = sorted(entry.name for entry in path.glob("*.y*ml"))
        listing = f"; it contains {', '.join(found[:5])}" if found else ""
        raise RecipeError(f"recipe {path}: expected a file; got a folder{listing}")
    if not path.exists():
        got = "no such file" if path.suffix in (".yaml", ".yml") else "no such recipe"
        known = shipped_recipes()
        raise RecipeError(
            f"recipe {str(path)!r}: {got}; expected a .yaml file or one of {', '.join(known)}."
            + nearest(path.name, known)
        )
    if path.suffix in SUFFIXES:
        raise RecipeError(
            f"recipe {path}: expected a .yaml file; got a {path.suffix} file, which has quantizers or statistics. "
            f"Evaluate with --quantizer-path {path}, or fit with --from-statistics {path}"
        )
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot read it: {error.strerror}") from error


def _broken(where: str, text: str, error: yaml.MarkedYAMLError) -> str:
    """Message with the line of a YAML error and its reason."""
    spot = error.problem_mark or error.context_mark
    if spot is None:
        return f"recipe {where}: not YAML: {error.problem}"
    start = text.splitlines()[spot.line : spot.line + 1]
    tabs = "; a tab is no indentation in YAML, use spaces" if "\t" in "".join(start)[: spot.column + 1] else ""
    return f"recipe {where}, line {spot.line + 1}: not YAML: {error.problem}{tabs}"


class _Reader:
    """YAML reader of plain values, with the line of each in `marks`.

    Unlike `yaml.safe_load` it raises for duplicate names, and leaves dates as text.
    """

    def __init__(self, text: str, where: str) -> None:
        self._loader, self._where = yaml.SafeLoader(text), where
        self.marks: dict[Location, str] = {}

    def read(self) -> Any:
        """Value of the document; None for an empty one."""
        node = self._loader.get_single_node()
        return None if node is None else self._value(node, ())

    def _value(self, node: yaml.Node, location: Location) -> Any:
        self.marks.setdefault(location, self._line(node))
        if len(self.marks) > _MOST_ENTRIES:
            raise RecipeError(f"recipe {self._where}: expected at most {_MOST_ENTRIES} entries; got more")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag in _COLLECTIONS and isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*location, number)) for number, item in enumerate(node.value)]
        if node.tag in _COLLECTIONS and isinstance(node, yaml.MappingNode):
            return self._mapping(node, location)
        raise self._not_plain(node)

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        self._check_names(node)
        self._loader.flatten_mapping(node)  # `<<` brings in another mapping's entries
        found = {}
        for name, value in node.value:
            place = (*location, name.value)
            self.marks[place] = self._line(name)
            found[name.value] = self._value(value, place)
        return found

    def _check_names(self, node: yaml.MappingNode) -> None:
        lines: dict[str, str] = {}
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise RecipeError(f"recipe {self._line(name)}: expected the name of an entry; got a list or entries")
            if name.value in lines:
                raise RecipeError(
                    f"recipe {self._line(name)}: {name.value} occurs twice; first in {lines[name.value]}. Remove one"
                )
            lines[name.value] = self._line(name)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag == _TIMESTAMP:
            return node.value
        if node.tag not in _SCALARS:
            raise self._not_plain(node)
        try:
            return self._loader.construct_object(node)
        except ValueError as error:
            raise RecipeError(
                f"recipe {self._line(node)}: expected a value of type {node.tag[18:]}; got {node.value!r:.80}"
            ) from error

    def _not_plain(self, node: yaml.Node) -> RecipeError:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        return RecipeError(f"recipe {self._line(node)}: expected plain entries; got {tag}, which no recipe needs")

    def _line(self, node: yaml.Node) -> str:
        return f"{self._where}, line {node.start_mark.line + 1}"
