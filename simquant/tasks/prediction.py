"""What a model answered, kept line by line in a file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, final, get_args

from simquant.tasks.errors import TaskError
from simquant.tasks.item import CellValue

Side = Literal["fp", "quantized"]


@final
@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to an item, with all that scoring needs.

    Parameters
    ----------
    task, id, references, choices, cell
        See `Item`.
    side : {'fp', 'quantized'}
        Whether the exact model answered, or the one with a quantized cache.
    text : str
        The answer.
    tokens : tuple of int
        The answer as the model gave it, what ended it included.
    n_prompt_tokens : int
        What the model read.
    prompt_digest : str
        Tells prompts apart, see `prompt_digest`.
    protocol : str
        How the answer came about, in one line.
    quantized_fraction : float or None
        Share of the cached tokens that were quantized; None where no fewer than 16 bits were asked for.
    """

    task: str
    id: str
    side: Side
    text: str
    tokens: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    cell: Mapping[str, CellValue] = field(default_factory=dict)
    n_prompt_tokens: int = 0
    prompt_digest: str = ""
    protocol: str = ""
    quantized_fraction: float | None = None

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("task", "id", "side", "text", "prompt_digest", "protocol"), str),
    **dict.fromkeys(("tokens", "references", "choices"), list),
    "cell": dict,
    "n_prompt_tokens": int,
    "quantized_fraction": (int, float, type(None)),
}
"""Of each field in JSON."""


def append_prediction(path: Path, prediction: Prediction) -> None:
    """Adds a line to a file, which is made if there is none."""
    with path.open("a", encoding="utf-8") as file:
        file.write(prediction.to_line() + "\n")


def read_predictions(path: Path, *, complete: bool = True) -> list[Prediction]:
    """The predictions in a file, in its order.

    Parameters
    ----------
    path : Path
        One JSON object a line.
    complete : bool
        False leaves out a last line without its end, which an interrupted run may leave, and lets the file be empty.

    Raises
    ------
    TaskError
        If the file is missing or empty, or a line is not a prediction, or comes twice; with the line's number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: expected a file of predictions; got {error}. Check the path.") from error
    if not complete:
        text = text[: text.rfind("\n") + 1]
    elif not text.strip():
        raise TaskError(f"{path}: expected predictions; got an empty file. Make them with evaluate --predictions FILE")
    lines = text.split("\n")  # not splitlines(): JSON strings may hold other characters that it takes for line ends
    found: dict[tuple[str, str, str], Prediction] = {}
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        prediction = _parse(line, where := f"{path}, line {number}")
        key = (prediction.task, prediction.id, prediction.side)
        if key in found:
            raise TaskError(f"{where}: expected each prediction once; got {' '.join(key)} again. Remove one of them.")
        found[key] = prediction
    return list(found.values())


def _parse(line: str, where: str) -> Prediction:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(
            f"{where}: expected a JSON object; got {error}: {line:.60}. Mend or remove the line."
        ) from error
    if not isinstance(record, dict):
        raise TaskError(f"{where}: expected a JSON object; got {line:.60}. Mend or remove the line.")
    missing = [name for name in ("task", "id", "side", "text", "references", "cell") if name not in record]
    unknown = [name for name in record if name not in _TYPES]
    if missing or unknown:
        raise TaskError(f"{where}: expected the fields of a prediction; missing {missing}, unknown {unknown}.")
    for name, value in record.items():
        if not isinstance(value, _TYPES[name]) or (name == "side" and value not in get_args(Side)):
            raise TaskError(f"{where}: {name} cannot be {value!r:.60}. Was it written by evaluate --predictions?")
    return Prediction(**{name: _tuple(value) for name, value in record.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


assert _TYPES.keys() == {field.name for field in fields(Prediction)}
