"""GSM8K: grade-school word problems, solved with a chain of thought."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import ClassVar, final

from simquant.tasks.data import data_file, hub_rows, read_rows
from simquant.tasks.errors import TaskError
from simquant.tasks.item import Item
from simquant.tasks.options import TaskOptions
from simquant.tasks.prediction import Prediction
from simquant.tasks.task import Task

EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "A florist ties bunches of 12 tulips. She has 150 tulips and gives 6 of them to her sister. How many bunches "
        "can she tie from the rest?",
        "After the gift she has 150 - 6 = 144 tulips. They make 144 / 12 = 12 bunches.\n#### 12",
    ),
    (
        "Marek reads 20 pages on Monday, twice as many on Tuesday and 15 fewer on Wednesday than on Tuesday. How many "
        "pages does he read in the three days?",
        "On Tuesday he reads 2 * 20 = 40 pages. On Wednesday he reads 40 - 15 = 25 pages. Together that is "
        "20 + 40 + 25 = 85 pages.\n#### 85",
    ),
    (
        "A ferry carries 45 cars at a fare of $18 each. A quarter of a full ferry's cars are let on for free on "
        "holidays, rounded down. How many dollars does a full ferry earn on a holiday?",
        "A quarter of 45 is 11.25, so 11 cars go for free. The other 45 - 11 = 34 cars pay 34 * 18 = 612 dollars.\n"
        "#### 612",
    ),
    (
        "Lena has 3 jars with 24 buttons each. She uses 10 buttons for a coat and loses 2. How many are left?",
        "She starts with 3 * 24 = 72 buttons. She parts with 10 + 2 = 12 of them, so 72 - 12 = 60 are left.\n#### 60",
    ),
    (
        "A tank holds 200 litres and is 30% full. A pump adds 7 litres a minute. How many minutes until it is full?",
        "The tank holds 200 * 0.3 = 60 litres already. It takes 200 - 60 = 140 litres more. The pump needs "
        "140 / 7 = 20 minutes.\n#### 20",
    ),
    (
        "Tickets cost $9 for adults and $5 for children. A family of 2 adults and 3 children pays with a $50 note. How "
        "much change does it get, in dollars?",
        "The adults pay 2 * 9 = 18 dollars and the children 3 * 5 = 15 dollars, together 18 + 15 = 33 dollars. The "
        "change is 50 - 33 = 17 dollars.\n#### 17",
    ),
    (
        "Omar is 4 years older than Pia, and Pia is three times as old as Quinn. If Quinn is 6, how old will Omar be "
        "in 5 years?",
        "Pia is 3 * 6 = 18. Omar is 18 + 4 = 22. In 5 years he will be 22 + 5 = 27.\n#### 27",
    ),
    (
        "A bakery sold 80 rolls in the morning at 60 cents each, and the remaining 40 in the evening at half the "
        "price. How many dollars did it take?",
        "In the morning it took 80 * 0.60 = 48 dollars. In the evening a roll cost 0.60 / 2 = 0.30 dollars, so 40 "
        "rolls brought 40 * 0.30 = 12 dollars. Together that is 48 + 12 = 60 dollars.\n#### 60",
    ),
)

_REPOSITORY, _CONFIG, _SPLIT = "openai/gsm8k", "main", "test"

_FIELDS = {"question": str, "answer": str}

# A sign, a dollar sign, digits with commas between thousands, and decimals: "-$1,018.50".
_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"

_MARKED = re.compile(rf"####\s*({_NUMBER})")


@final
@dataclass(frozen=True, kw_only=True)
class GSM8K(Task):
    """Word problems after eight solved examples, which are ours: figures differ from those with other examples.

    References
    ----------
    arXiv 2110.14168 (data), 2201.11903 (chain-of-thought examples).
    """

    name: str = "gsm8k"
    metric: str = "strict match: the number behind ####"
    n_items: ClassVar[int] = 1319
    max_new_tokens: ClassVar[int] = 400

    def items(self, options: TaskOptions) -> Sequence[Item]:
        """Items from the test split, in its order."""
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
                format=options.format,
                # In a conversation an answer has paragraphs.
                stop=("\nQuestion:",) if options.format == "chat" else ("\nQuestion:", "\n\n"),
            )
            for number, row in enumerate(rows[: options.limit or self.n_items], 1)
        ]

    def score(self, text: str, item: Item | Prediction) -> float:
        """Score 1 if the first number after #### is the reference, else 0."""
        return _is_right(strict_match(text), item)

    def others(self, fp: Prediction, quantized: Prediction) -> dict[str, tuple[float, float]]:
        """Flexible match: score 1 if the last number of the answer is the reference."""
        exact, own = (_is_right(flexible_match(prediction.text), prediction) for prediction in (fp, quantized))
        return {"flexible match: the last number": (exact, own)}


def strict_match(text: str) -> str | None:
    """First number after ####.

    Examples
    --------
    >>> strict_match("9 * 2 = 18 dollars. #### 1,018.")
    '1018'
    """
    found = _MARKED.search(text)
    return _plain(found.group(1)) if found else None


def flexible_match(text: str) -> str | None:
    """Last number of a text.

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
    """Score 1 if a number equals a reference as a decimal, so that 18 is 18.00."""
    try:
        return float(number is not None and Decimal(number) in {Decimal(one) for one in item.references})
    except InvalidOperation as error:
        raise TaskError(
            f"{item.task} {item.id}: expected numbers as references; got {item.references}. Correct the data."
        ) from error


def _reference(answer: str, where: str) -> str:
    number = strict_match(answer)
    if number is None:
        raise TaskError(
            f"{where}: expected an answer that ends in '#### ' and a number; got {answer[-40:]!r}. Correct or remove "
            "the line."
        )
    return number


def _shots() -> str:
    return "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in EXAMPLES)
