"""Figures as text: a reader sees no digit that means nothing."""

import math

UNKNOWN = "no number"


def plain(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits.

    Examples
    --------
    >>> plain(8.10438, 4), plain(-0.00031), plain(None)
    ('8.104', '−0.000310', 'no number')
    """
    if value is None:
        return UNKNOWN
    if not value:
        return "0"
    # Rounded before its digits are counted: 9.996 becomes 10.0, which has a place less.
    value = float(f"{value:.{digits - 1}e}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}" if abs(value) >= 1e-4 and places < 9 else f"{value:.{digits - 1}e}"
    return text.replace("-", "−")


def with_error(value: float | None, stderr: float | None) -> str:
    """A figure and its standard error, to two digits of the latter.

    Examples
    --------
    >>> with_error(0.04123, 0.00584), with_error(0.5, None), with_error(1.0, 0.0)
    ('0.0412 ± 0.0058', '0.500', '1.00')
    """
    if value is None or not stderr:
        return plain(value)
    # Two digits of the error, and the figure to the same place: further digits are noise.
    places = min(9, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:.{places}f} ± {stderr:.{places}f}".replace("-", "−")


def percent(share: float | None, signed: bool = False) -> str:
    """A share as per cent.

    Examples
    --------
    >>> percent(0.0412, signed=True), percent(0.6), percent(0.00012)
    ('+4.1 %', '60 %', '0.012 %')
    """
    if share is None:
        return UNKNOWN
    text = plain(100 * share, 2)
    return f"{'+' if signed and share > 0 else ''}{text} %"


def size(n_bytes: float) -> str:
    """Bytes in binary units.

    Examples
    --------
    >>> size(6176), size(3 * 2**30)
    ('6.03 KiB', '3 GiB')
    """
    power = min(4, int(math.log2(max(1, n_bytes)) // 10))
    amount = n_bytes / 1024**power
    return f"{int(amount) if amount == int(amount) else plain(amount)} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def context(n_tokens: int) -> str:
    """A context length: 2K, 32K, 128K."""
    return f"{n_tokens // 1024}K" if n_tokens % 1024 == 0 else str(n_tokens)
