"""Documents that become token ids when they are looked at."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

Tokenizer = Callable[[str], Sequence[int]]
"""Text to token ids."""


class LazyDocuments:
    """Documents that are tokenised when taken: C4 has far more of them than a run draws.

    Parameters
    ----------
    texts : Sequence of str
        One text per document.
    tokenizer : Callable
        Text to token ids.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._texts = texts
        self._tokenizer = tokenizer

    def changed(self, change: Callable[[Int64[Tensor, "_"]], Int64[Tensor, "_"]]) -> "LazyDocuments":
        """The same documents, with a change that is made when one is taken."""
        return LazyDocuments(self._texts, lambda text: change(self._tokens(text)).tolist())

    def _tokens(self, text: str) -> Int64[Tensor, "_"]:
        return torch.as_tensor(self._tokenizer(text), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Int64[Tensor, "tokens"]:
        return self._tokens(self._texts[index])

    def __iter__(self) -> Iterator[Int64[Tensor, "_"]]:
        return (self[index] for index in range(len(self)))
