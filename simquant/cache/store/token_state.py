"""What a `TokenStore` holds, as it gives it away and takes it back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizers.streaming import StreamingState


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenState:
    """All that differs between stores of one site.

    Parameters
    ----------
    counts : Mapping[str, int]
        Numbers of tokens and blocks, by the names that files have for them.
    exact : Mapping[str, Tensor or None]
        Tokens that are held as they came, and which of them stay so, by the same; None before the first append.
    blocks : sequence of Codes
        The encoded tokens.
    running : StreamingState or None
        Where the scales of the next token go on; None where nothing runs.
    """

    counts: Mapping[str, int]
    exact: Mapping[str, Tensor | None]
    blocks: Sequence[Codes]
    running: StreamingState | None
