"""GSM8K: sums in words, to be solved in steps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import ClassVar, final

from simquant.tasks.data import data_file, hub_rows, read_rows
from simquant.tasks.errors import TaskError
from simquant.tasks.gsm8k_examples import EXAMPLES
from simquant.tasks.item import Item
from simquant.tasks.options import TaskOptions
from simquant.tasks.prediction import Prediction
from simquant.tasks.task import Task

_REPOSITORY, _CONFIG, _SPLIT = "openai/gsm8k", "main", "test"
_FIELDS = {"question": str, "answer": str}
_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
_MARKED = re.compile(rf"####\s*({_NUMBER})")


@final
@dataclass(frozen=True, kw_only=True)
class GSM8K(Task):
    """Sums in words after eight solved examples, which are ours: figures differ from those with other examples.

    References
    ----------
    arXiv 2110.14168 (data), 2201.11903 (examples that think aloud).
    """

    name: str = "gsm8k"
    metric: str = "strict match: the number behind ####"
    n_items: ClassVar[int] = 1319
    max_new_tokens: ClassVar[int] = 400

    def items(self, options: TaskOptions) -> Sequence[Item]:
        """The first of the test split, in its order."""
        path = data_file(options.data, self.name)
        rows = (
            hub_rows(_REPOSITORY, _CONFIG, _SPLIT, _FIELDS, "--task-data gsm8k-test.jsonl")
            if path is None
            else read_rows(path, _FIELDS)
        )
        where = _REPOSITORY if path is None else str(path)
        return [
            Item(
                task=self.name,
                id=str(number),
                prompt=f"{_shots()}Question: {row['question'].strip()}\nAnswer:",
                references=(_reference(row["answer"], f"{where}, line {number}"),),
                max_new_tokens=self.max_new_tokens,
                stop=("\nQuestion:", "\n\n"),
            )
            for number, row in enumerate(rows[: options.limit or self.n_items], 1)
        ]

    def score(self, text: str, item: Item | Prediction) -> float:
        """1 if the first number behind #### is the reference."""
        return _is_right(strict_match(text), item)

    def others(self, fp: Prediction, quantized: Prediction) -> dict[str, tuple[float, float]]:
        """Whether the last number of the answer is right, wherever it stands."""
        exact, own = (_is_right(flexible_match(prediction.text), prediction) for prediction in (fp, quantized))
        return {"flexible match: the last number": (exact, own)}


def strict_match(text: str) -> str | None:
    """The first number behind ####.

    Examples
    --------
    >>> strict_match("9 * 2 = 18 dollars. #### 1,018.")
    '1018'
    """
    found = _MARKED.search(text)
    return _plain(found.group(1)) if found else None


def flexible_match(text: str) -> str | None:
    """The last number, wherever it stands.

    Examples
    --------
    >>> flexible_match("She pays $1,018.50 for 3 of them, or -2.")
    '-2'
    """
    found = re.findall(_NUMBER, text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "")


def _is_right(number: str | None, item: Item | Prediction) -> float:
    """Numbers are compared as such: 18 is 18.00."""
    try:
        return float(number is not None and Decimal(number) in {Decimal(one) for one in item.references})
    except InvalidOperation as error:
        raise TaskError(f"{item.task} {item.id}: expected a number as reference; got {item.references}") from error


def _reference(answer: str, where: str) -> str:
    number = strict_match(answer)
    if number is None:
        raise TaskError(f"{where}: expected an answer that ends in '#### ' and a number; got {answer[-40:]!r}")
    return number


def _shots() -> str:
    return "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in EXAMPLES)
