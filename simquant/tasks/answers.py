"""How answers are held against references."""

import re
from collections.abc import Sequence


def found_share(text: str, references: Sequence[str]) -> float:
    """Which share of the references stands in a text, as whole words in either case.

    Examples
    --------
    >>> found_share("It was 12, then 345.", ("12", "34"))
    0.5
    """
    return sum(bool(re.search(rf"\b{re.escape(one)}\b", text, re.IGNORECASE)) for one in references) / len(references)


def first_number_fits(text: str, references: Sequence[str]) -> float:
    """1 if the first digits of a text are the reference, else 0.

    Examples
    --------
    >>> first_number_fits("123456, or 12345", ("12345",))
    0.0
    """
    first = re.search(r"\d+", text)
    return float(first is not None and first.group() in references)
