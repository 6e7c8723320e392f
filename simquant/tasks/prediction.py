"""Predictions, in a JSON Lines file."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, final, get_args

from simquant.tasks.errors import TaskError
from simquant.tasks.item import CellValue, Format

Side = Literal["fp", "quantized"]


@final
@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Answer to an item, with all that scoring needs.

    Parameters
    ----------
    task, id, format, references, choices, cell
        See `Item`.
    side : {'fp', 'quantized'}
        Model that answered: in full precision, or with a quantized cache.
    text : str
        Text of the answer.
    tokens : tuple of int
        Tokens of the answer, the one that ended it included.
    n_prompt_tokens : int
        Number of tokens of the prompt.
    prompt_digest : str
        Digest that identifies the prompt, see `prompt_digest`.
    protocol : str
        Line that describes the model, the cache and the decoding.
    quantized_fraction : float or None
        Share of the cached tokens that were quantized, 0 if the answer ended before any was read; None if no quantizer
        has fewer than 16 bits.
    """

    task: str
    id: str
    side: Side
    text: str
    format: Format = "plain"
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
        """Properties that the answer and its score depend on: digest of the prompt, references and choices."""
        return self.prompt_digest, self.references, self.choices

    def to_line(self) -> str:
        """JSON on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    """True for a finite int or float, but not for a bool, which is an int in Python."""
    return type(value) in (int, float) and abs(value) < math.inf


_FITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("task", "id", "text", "prompt_digest", "protocol"), _is_text),
    "side": lambda value: value in get_args(Side),
    "format": lambda value: value in get_args(Format),
    "tokens": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    **dict.fromkeys(("references", "choices"), lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "cell": lambda value: isinstance(value, dict) and all(_is_text(v) or _is_number(v) for v in value.values()),
    "n_prompt_tokens": _is_count,
    "quantized_fraction": lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
}
"""Checks of the JSON value of each field."""


def append_prediction(path: Path, prediction: Prediction) -> None:
    """Appends a prediction to a file, which is created if there is none."""
    # One write per line: an interrupted run leaves complete lines, and at most one incomplete one at the end.
    with path.open("a", encoding="utf-8") as file:
        file.write(prediction.to_line() + "\n")


def read_predictions(path: Path, *, complete: bool = True) -> list[Prediction]:
    """Predictions of a file, in its order.

    Parameters
    ----------
    path : Path
        File with one JSON object per line.
    complete : bool
        False skips an incomplete last line, which an interrupted run may leave, and allows an empty file.

    Raises
    ------
    TaskError
        If the file is missing or empty, or a line is not a prediction, or is repeated; the message has the line's
        number.
    """
    try:
        content = path.read_bytes()
        text = (content if complete else content[: content.rfind(b"\n") + 1]).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: expected a file of predictions; got {error}. Check the path.") from error
    if complete and not text.strip():
        raise TaskError(f"{path}: expected predictions; got an empty file. Make them with evaluate --predictions FILE.")
    lines = text.split("\n")  # not splitlines(), which also splits at characters that JSON strings may hold
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
            f"{where}: expected a JSON object; got {error}: {line:.60}. Correct or remove the line."
        ) from error
    if not isinstance(record, dict):
        raise TaskError(f"{where}: expected a JSON object; got {line:.60}. Correct or remove the line.")
    missing = [name for name in ("task", "id", "side", "text", "references", "cell") if name not in record]
    unknown = [name for name in record if name not in _FITS]
    if missing or unknown:
        raise TaskError(
            f"{where}: expected the fields of a prediction; missing {missing}, unknown {unknown}. Correct or remove "
            "the line."
        )
    for name, value in record.items():
        if not _FITS[name](value):
            raise TaskError(
                f"{where}: {name} cannot be {value!r:.60} in a line of evaluate --predictions. Correct or remove the "
                "line."
            )
    return Prediction(**{name: _tuple(value) for name, value in record.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


assert _FITS.keys() == {field.name for field in fields(Prediction)}
