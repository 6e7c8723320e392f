"""What a user may have to say of a foreign file, because the file does not."""

from dataclasses import dataclass

from artifacts.errors import MismatchError


@dataclass(frozen=True, kw_only=True)
class Hints:
    """The flags that the other tools want typed again whenever a file is used.

    Parameters
    ----------
    bits : int or None
        Code width, where no table of levels tells it.
    codebooks : bool or None
        Whether the file must hold tables of levels; None takes what is there.
    normal_float : bool
        Ranges without a table stand for NormalFloat levels, not for a uniform grid.
    outlier_fraction : float or None
        Share of values kept exact; None means that thresholds are plain ranges.
    sink_tokens : int
        First positions that stay exact.
    """

    bits: int | None = None
    codebooks: bool | None = None
    normal_float: bool = False
    outlier_fraction: float | None = None
    sink_tokens: int = 0

    def bits_of_table(self, place: str, n_levels: int) -> int:
        """Code width of a table.

        Raises
        ------
        MismatchError
            If the hints say otherwise, or no width has so many levels.
        """
        bits = n_levels.bit_length() - 1
        if not 1 <= bits <= 8 or n_levels != 2**bits:
            raise MismatchError(f"{place}: expected 2, 4, 8, ... 256 levels; got {n_levels}. Is the file damaged?")
        if self.codebooks is False:
            raise MismatchError(f"{place}: --no-nuq was asked for; the file holds {n_levels} levels. Drop --no-nuq")
        if self.bits not in (None, bits):
            raise MismatchError(
                f"{place}: --abits {self.bits} was asked for; the file holds {n_levels} levels, {bits} bits"
            )
        return bits

    def bits_of_range(self, place: str) -> int:
        """Code width where the file holds ranges alone.

        Raises
        ------
        MismatchError
            If nothing says it, or the hints ask for a table.
        """
        if self.codebooks:
            raise MismatchError(f"{place}: --nuq was asked for; the file holds ranges and no levels. Drop --nuq")
        if self.bits is None:
            raise MismatchError(f"{place}: the file does not say how many bits its codes have. Add --abits N")
        if not 1 <= self.bits <= 8:
            raise MismatchError(f"{place}: expected 1 to 8 bits; got {self.bits}")
        return self.bits
