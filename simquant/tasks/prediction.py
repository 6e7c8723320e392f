"""What a model answered, kept line by line in a file."""

import json
import math
from collections.abc import Callable, Mapping
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
        Share of the cached tokens that were quantized, 0 if the answer was over before any was read; None where no
        fewer than 16 bits were asked for.
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

    @property
    def question(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """What the answer and its score depend on: digest of the prompt, references and choices."""
        return self.prompt_digest, self.references, self.choices

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    """Neither a bool, which Python takes for an integer, nor infinite, nor NaN."""
    return type(value) in (int, float) and abs(value) < math.inf


_FITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("task", "id", "text", "prompt_digest", "protocol"), _is_text),
    "side": lambda value: value in get_args(Side),
    "tokens": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    **dict.fromkeys(("references", "choices"), lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "cell": lambda value: isinstance(value, dict) and all(_is_text(v) or _is_number(v) for v in value.values()),
    "n_prompt_tokens": _is_count,
    "quantized_fraction": lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
}
"""What each field may be in JSON."""


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
        content = path.read_bytes()
        text = (content if complete else content[: content.rfind(b"\n") + 1]).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: expected a file of predictions; got {error}. Check the path.") from error
    if complete and not text.strip():
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
    unknown = [name for name in record if name not in _FITS]
    if missing or unknown:
        raise TaskError(f"{where}: expected the fields of a prediction; missing {missing}, unknown {unknown}.")
    for name, value in record.items():
        if not _FITS[name](value):
            raise TaskError(f"{where}: {name} cannot be {value!r:.60}. Was it written by evaluate --predictions?")
    return Prediction(**{name: _tuple(value) for name, value in record.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


assert _FITS.keys() == {field.name for field in fields(Prediction)}
