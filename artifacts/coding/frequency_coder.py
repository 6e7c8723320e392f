"""Range coder for integers, with a frequency table per channel."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from constriction import stream
from jaxtyping import Int32, UInt32
from numpy.typing import NDArray

from artifacts.errors import InvalidValueError

TOTAL = 2**15
"""Sum of the frequencies of a table; each frequency fits a signed 16-bit integer."""

LARGEST_INDEX = 2**20
"""Largest magnitude of an index."""

_LENGTHS = 32
"""Size of the uniform alphabet of bit lengths in the escape code: 5 bits each."""

_LONGEST = 22
"""Largest bit length that occurs in the escape code; the smallest is 1."""


class FrequencyCoder:
    """Range coder for the indices of several channels.

    An index within the table of its channel takes about log2(TOTAL / frequency) bits. An index outside takes the escape
    symbol of the table; its distance from the table follows at the end of the stream, as a bit length in 5 bits and the
    bits themselves.

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
        """Compressed words of one stream: the symbols channel by channel, then the distances of escaped indices.

        Raises
        ------
        ValueError
            If an index lies beyond `LARGEST_INDEX`.
        """
        least, largest = indices.min(initial=0), indices.max(initial=0)
        if max(-int(least), int(largest)) > LARGEST_INDEX:
            raise InvalidValueError(
                f"FrequencyCoder: expected indices from {-LARGEST_INDEX} to {LARGEST_INDEX}; got {least} to {largest}"
            )
        symbols, beyond = self._symbols(indices)
        encoder = stream.queue.RangeEncoder()
        for model, row in zip(self._models, symbols, strict=True):
            encoder.encode(row, model)
        # Arithmetic coding (Rissanen 1976; range coder, Martin 1979): a symbol narrows the interval by its probability
        # f / TOTAL, -log2(f / TOTAL) bits. An escaped distance n >= 2 is sent as floor(log2 n) in 5 bits, then n minus
        # its leading power of two in that many bits (Elias 1975, gamma code with a fixed-length prefix).
        if len(beyond):
            lengths = _bit_lengths(beyond)
            encoder.encode(lengths, stream.model.Uniform(_LENGTHS))
            encoder.encode(beyond - (1 << lengths), stream.model.Uniform(), 1 << lengths)
        words: UInt32[np.ndarray, " words"] = encoder.get_compressed()
        return words

    def decode(self, words: UInt32[np.ndarray, " words"], n_tokens: int) -> Int32[np.ndarray, "channels tokens"]:
        """Indices of a stream.

        Raises
        ------
        ValueError
            If the stream does not hold exactly `n_tokens` tokens.
        """
        with _panics_as_errors(f"the stream of {len(words)} words is not that of {n_tokens} tokens"):
            decoder = stream.queue.RangeDecoder(words)
            symbols = np.stack([decoder.decode(model, n_tokens) for model in self._models])
            escaped = symbols == self._lengths
            indices = symbols + self._first
            indices[escaped] = self._from_beyond(_decode_beyond(decoder, int(escaped.sum())), escaped)
            if not decoder.maybe_exhausted():
                raise InvalidValueError("words follow the last token")
        return indices

    def ideal_bits(self, indices: Int32[np.ndarray, "channels tokens"]) -> float:
        """Bits that an ideal coder with the same tables needs, escapes included."""
        symbols, beyond = self._symbols(indices)
        coded = sum(float(cost[row].sum()) for cost, row in zip(self._costs, symbols, strict=True))
        return coded + float((_LENGTHS.bit_length() - 1 + _bit_lengths(beyond)).sum())

    def _symbols(
        self, indices: Int32[np.ndarray, "channels tokens"]
    ) -> tuple[Int32[np.ndarray, "channels tokens"], Int32[np.ndarray, " escaped"]]:
        """Symbols in the tables (the escape symbol where an index lies outside), and the distances of those outside."""
        # Signed distances become integers from 2 by interleaving, as in zigzag coding: d above the table is 2 d and d
        # below is 2 d + 1 (d from 1), so that the sign costs one bit.
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
        raise InvalidValueError(
            f"escapes have bit lengths from 1 to {_LONGEST}; got {lengths.min()} to {lengths.max()}"
        )
    beyond: NDArray[np.int32] = decoder.decode(stream.model.Uniform(), 1 << lengths) + (1 << lengths)
    return beyond


@contextmanager
def _panics_as_errors(problem: str) -> Iterator[None]:
    """Turns errors and panics of constriction into a ValueError that names the problem.

    A panic of its Rust code is no `Exception`, and its class cannot be imported: it would end a server that survives
    every other damaged request.

    Raises
    ------
    ValueError
        In place of the error or panic.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError | AssertionError) or type(error).__name__ == "PanicException":
            raise InvalidValueError(f"FrequencyCoder: {problem} ({error})") from error
        raise


def _bit_lengths(beyond: Int32[np.ndarray, " escaped"]) -> Int32[np.ndarray, " escaped"]:
    """Number of bits after the leading one: floor(log2 n)."""
    lengths: NDArray[np.int32] = np.frexp(beyond.astype(np.float64))[1].astype(np.int32)
    return lengths - 1
