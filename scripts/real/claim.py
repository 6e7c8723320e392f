"""A claim about caches: a figure that was measured, and the bound that it must keep."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvgauge.terminal.text_table import text_table


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A figure and its bound.

    Parameters
    ----------
    what : str
        The figure, with its unit.
    measured : float
        As it was found.
    stderr : float
        Its standard error; two of them may lie between the figure and the bound, as the text is a sample. 0 where the
        figure is exact, or is compared on the same windows.
    at_most, at_least : float or None
        The bound; one of both.
    """

    what: str
    measured: float
    stderr: float = 0.0
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the figure keeps the bound; never if it is not a number."""
        above = self.at_least is None or self.measured + 2 * self.stderr >= self.at_least
        below = self.at_most is None or self.measured - 2 * self.stderr <= self.at_most
        return above and below

    def cells(self) -> list[str]:
        """A line of the table."""
        error = f" ± {self.stderr:.2g}" if self.stderr else ""
        bound = f"at most {self.at_most:g}" if self.at_least is None else f"at least {self.at_least:g}"
        return [self.what, f"{self.measured:.4g}{error}", bound, "holds" if self.holds else "FAILS"]


def table(claims: Sequence[Claim]) -> str:
    """All claims."""
    return text_table(["claim", "measured", "bound", ""], [claim.cells() for claim in claims])
