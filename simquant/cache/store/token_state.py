"""State of a `TokenStore`, for saving and restoring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizers.streaming import StreamingState


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenState:
    """Mutable state of a `TokenStore`: all that differs between stores of one site.

    Parameters
    ----------
    counts : Mapping[str, int]
        Numbers of tokens and blocks, by their names in files.
    exact : Mapping[str, Tensor or None]
        Tokens in full precision, and the mask of those kept so for good, by their names in files; None before the
        first append.
    blocks : sequence of Codes
        Encoded tokens.
    running : StreamingState or None
        State of running scales before the next token; None without running scales.
    """

    counts: Mapping[str, int]
    exact: Mapping[str, Tensor | None]
    blocks: Sequence[Codes]
    running: StreamingState | None
