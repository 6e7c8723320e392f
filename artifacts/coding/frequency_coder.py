"""Integers as one stream of bits, each channel's with a table of frequencies of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from constriction import stream
from jaxtyping import Int32, UInt32
from numpy.typing import NDArray

TOTAL = 2**15
"""Sum of the frequencies of a table: each of them fits a signed 16-bit integer."""

LARGEST_INDEX = 2**20
"""Indices lie from minus this to this."""

_LENGTHS = 32
"""Numbers of bits after the leading one of what is coded raw."""

_LONGEST = 22
"""The largest that occurs; the smallest is 1."""


class FrequencyCoder:
    """A range coder for indices of several channels.

    An index within its channel's table takes about log2(TOTAL / frequency) bits. One beyond takes the table's escape
    symbol; how far beyond it lies follows at the end of the stream, in 5 bits and about twice as many as it needs.

    Parameters
    ----------
    first : Sequence[int]
        Smallest index of each channel's table.
    tables : Sequence of integer arrays
        Of each channel, the frequencies of its indices in ascending order, then that of the escape symbol; all
        positive, with the sum `TOTAL`.

    Examples
    --------
    >>> coder = FrequencyCoder([-1], [np.array([8192, 16384, 8188, 4])])
    >>> words = coder.encode(np.array([[0, 1, 0, -1, 70]], dtype=np.int32))
    >>> coder.decode(words, 5).tolist()
    [[0, 1, 0, -1, 70]]
    """

    def __init__(self, first: Sequence[int], tables: Sequence[NDArray[Any]]) -> None:
        self._first = np.array(first, dtype=np.int32)[:, None]
        self._lengths = np.array([len(table) - 1 for table in tables], dtype=np.int32)[:, None]
        self._costs = [-np.log2(table / TOTAL) for table in tables]
        self._models = [stream.model.Categorical(table.astype(np.float32), perfect=False) for table in tables]

    def encode(self, indices: Int32[np.ndarray, "channels tokens"]) -> UInt32[np.ndarray, " words"]:
        """One stream: the symbols of a channel after those of the one before, then what escaped.

        Raises
        ------
        ValueError
            If an index lies beyond `LARGEST_INDEX`.
        """
        least, largest = indices.min(initial=0), indices.max(initial=0)
        if max(-int(least), int(largest)) > LARGEST_INDEX:
            raise ValueError(
                f"FrequencyCoder: expected indices from {-LARGEST_INDEX} to {LARGEST_INDEX}; got {least} to {largest}"
            )
        symbols, beyond = self._symbols(indices)
        encoder = stream.queue.RangeEncoder()
        for model, row in zip(self._models, symbols, strict=True):
            encoder.encode(row, model)
        if len(beyond):
            lengths = _bit_lengths(beyond)
            encoder.encode(lengths, stream.model.Uniform(_LENGTHS))
            encoder.encode(beyond - (1 << lengths), stream.model.Uniform(), 1 << lengths)
        words: UInt32[np.ndarray, " words"] = encoder.get_compressed()
        return words

    def decode(self, words: UInt32[np.ndarray, " words"], n_tokens: int) -> Int32[np.ndarray, "channels tokens"]:
        """The indices of a stream.

        Raises
        ------
        ValueError
            If the stream is not that of so many tokens.
        """
        with _refusing_panics(f"the stream of {len(words)} words is not that of {n_tokens} tokens"):
            decoder = stream.queue.RangeDecoder(words)
            symbols = np.stack([decoder.decode(model, n_tokens) for model in self._models])
            escaped = symbols == self._lengths
            indices = symbols + self._first
            indices[escaped] = self._from_beyond(_decode_beyond(decoder, int(escaped.sum())), escaped)
            if not decoder.maybe_exhausted():
                raise ValueError("more follows")
        return indices

    def ideal_bits(self, indices: Int32[np.ndarray, "channels tokens"]) -> float:
        """What an ideal coder with the same tables needs."""
        symbols, beyond = self._symbols(indices)
        coded = sum(float(cost[row].sum()) for cost, row in zip(self._costs, symbols, strict=True))
        return coded + float((_LENGTHS.bit_length() - 1 + _bit_lengths(beyond)).sum())

    def _symbols(
        self, indices: Int32[np.ndarray, "channels tokens"]
    ) -> tuple[Int32[np.ndarray, "channels tokens"], Int32[np.ndarray, " escaped"]]:
        """Places in the tables, and how far beyond them the others lie: 2, 4, ... above and 3, 5, ... below."""
        symbols = indices - self._first
        below, above = symbols < 0, symbols >= self._lengths
        beyond = np.where(below, 1 - 2 * symbols, 2 * (symbols - self._lengths) + 2)[below | above]
        return np.where(below | above, self._lengths, symbols), beyond

    def _from_beyond(
        self, beyond: Int32[np.ndarray, " escaped"], escaped: NDArray[np.bool_]
    ) -> Int32[np.ndarray, " escaped"]:
        channel, _ = escaped.nonzero()
        first, length = self._first[channel, 0], self._lengths[channel, 0]
        indices: NDArray[np.int32] = np.where(beyond % 2 == 1, first - beyond // 2, first + length + beyond // 2 - 1)
        return indices


def _decode_beyond(decoder: stream.queue.RangeDecoder, n_escaped: int) -> Int32[np.ndarray, " escaped"]:
    if not n_escaped:
        return np.zeros(0, dtype=np.int32)
    lengths = decoder.decode(stream.model.Uniform(_LENGTHS), n_escaped)
    if lengths.min() < 1 or lengths.max() > _LONGEST:  # no model of so many values: constriction would panic
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}; 1 to {_LONGEST} occur")
    beyond: NDArray[np.int32] = decoder.decode(stream.model.Uniform(), 1 << lengths) + (1 << lengths)
    return beyond


@contextmanager
def _refusing_panics(problem: str) -> Iterator[None]:
    """Says what is wrong in place of whatever constriction says.

    A panic of its Rust code is no `Exception`, and its class cannot be imported: it would end a server that survives
    every other damaged request.

    Raises
    ------
    ValueError
        With the problem.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError | AssertionError) or type(error).__name__ == "PanicException":
            raise ValueError(f"FrequencyCoder: {problem} ({error})") from error
        raise


def _bit_lengths(beyond: Int32[np.ndarray, " escaped"]) -> Int32[np.ndarray, " escaped"]:
    """Bits after the leading one."""
    lengths: NDArray[np.int32] = np.frexp(beyond.astype(np.float64))[1].astype(np.int32)
    return lengths - 1
