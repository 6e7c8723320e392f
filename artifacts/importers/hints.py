"""Settings that foreign files lack and a user gives."""

from dataclasses import dataclass

from artifacts.errors import MismatchError


@dataclass(frozen=True, kw_only=True)
class Hints:
    """Settings that the other tools take as flags whenever a file is used.

    Parameters
    ----------
    bits : int or None
        Code width, for a file without codebooks.
    codebooks : bool or None
        True requires codebooks in the file, False requires ranges alone; None accepts both.
    normal_float : bool
        Use NormalFloat levels for ranges without a codebook, rather than a uniform grid.
    outlier_fraction : float or None
        Fraction of values kept as 16-bit outliers; None takes thresholds as plain ranges.
    sink_tokens : int
        First positions that are kept in full precision.
    """

    bits: int | None = None
    codebooks: bool | None = None
    normal_float: bool = False
    outlier_fraction: float | None = None
    sink_tokens: int = 0

    def bits_of_table(self, place: str, n_levels: int) -> int:
        """Code width of a codebook.

        Raises
        ------
        MismatchError
            If the hints contradict it, or the number of levels is no power of two from 2 to 256.
        """
        bits = n_levels.bit_length() - 1
        if not 1 <= bits <= 8 or n_levels != 2**bits:
            raise MismatchError(f"{place}: expected 2, 4, 8, ... 256 levels; got {n_levels}. Is the file damaged?")
        if self.codebooks is False:
            raise MismatchError(f"{place}: --no-nuq was given, but the file has {n_levels} levels. Drop --no-nuq")
        if self.bits not in (None, bits):
            raise MismatchError(
                f"{place}: --abits {self.bits} was given, but the file has {n_levels} levels, which are {bits} bits. "
                "Drop --abits"
            )
        return bits

    def bits_of_range(self, place: str) -> int:
        """Code width of a file with ranges alone.

        Raises
        ------
        MismatchError
            If no hint gives it, or the hints require codebooks.
        """
        if self.codebooks:
            raise MismatchError(f"{place}: --nuq was given, but the file has ranges without codebooks. Drop --nuq")
        if self.bits is None:
            raise MismatchError(f"{place}: the file does not contain the code width. Add --abits N")
        if not 1 <= self.bits <= 8:
            raise MismatchError(f"{place}: --abits must be from 1 to 8; got {self.bits}")
        return self.bits
