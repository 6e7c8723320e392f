"""Comparisons of answers with references."""

import re
from collections.abc import Sequence


def found_share(text: str, references: Sequence[str]) -> float:
    """Share of the references that occur in a text, as whole words, ignoring case.

    Examples
    --------
    >>> found_share("It was 12, then 345.", ("12", "34"))
    0.5
    """
    return sum(bool(re.search(rf"\b{re.escape(one)}\b", text, re.IGNORECASE)) for one in references) / len(references)


def first_number_fits(text: str, references: Sequence[str]) -> float:
    """Score 1 if the first number of a text is a reference, else 0.

    Examples
    --------
    >>> first_number_fits("123456, or 12345", ("12345",))
    0.0
    """
    first = re.search(r"\d+", text)
    return float(first is not None and first.group() in references)
