"""The tokens of one sequence at one site, as a cache keeps them: sinks, codes, recent tokens."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.running import encode_from, first_state
from simquant.cache.errors import CacheStateError
from simquant.cache.store.kept_exact import KeptExact
from simquant.cache.store.room import Room
from simquant.cache.store.token_state import TokenState
from simquant.policy.policy import CachePolicy, ResidualWindow

_COUNTS = ("n_tokens", "n_evicted", "encoded_end", "_forgotten_blocks")
_EXACT = ("_sinks", "_recent", "_recent_kept")


def no_context(tokens: slice) -> Context:
    """Of a site that is not predicted."""
    return ()


class TokenStore:
    """Append-only storage in which every token is encoded once, when it leaves the window.

    What is stored is never changed in place, so that copies (beams) share it.

    Parameters
    ----------
    quantizer : Quantizer
        That of the site, with tensors on the device of the tokens.
    policy : CachePolicy
        Which tokens stay exact.
    window : ResidualWindow
        The policy's window for this site.
    block_tokens : int
        Tokens that are decoded at a time; whole groups for the quantizer.
    """

    def __init__(self, quantizer: Quantizer, policy: CachePolicy, window: ResidualWindow, block_tokens: int) -> None:
        self.quantizer = KeptExact.around(quantizer) if policy.keep_smallest_norm else quantizer
        self.window, self.block_tokens = window, block_tokens
        self.sink_tokens = self.encoded_end = policy.sink_tokens
        self.n_tokens = self.n_evicted = 0  # tokens are numbered among those that are held
        self.blocks: list[Codes] = []
        self._sinks: Tensor | None = None
        self._recent: Tensor | None = None
        self._recent_kept: Tensor | None = None
        self._forgotten_blocks = 0
        self._state = first_state(quantizer)
        self._context: Callable[[slice], Context] = no_context
        self._decoded: Tensor | None = None
        self._room = Room()  # of the block that is not full

    def append(
        self,
        rows: Float[Tensor, "tokens channels"],
        kept: Bool[Tensor, " tokens"] | None = None,
        context: Callable[[slice], Context] = no_context,
    ) -> None:
        """Takes in the tokens that follow; encodes those that leave the window.

        Where `kept` is true a token that leaves is still read as it came; only under a policy that keeps such tokens.
        `context` gives what a predicted site's quantizer needs beside encoded tokens, counted from the first no sink.
        """
        self._context, self._decoded = context, None
        n_sinks = min(len(rows), max(0, self.sink_tokens - self.n_tokens))
        sinks = _joined(self._sinks, rows[:n_sinks])
        recent = _joined(self._recent, rows[n_sinks:])
        recent_kept = None if kept is None else _joined(self._recent_kept, kept[n_sinks:])
        n_tokens = self.n_tokens + len(rows)
        end = self.window.encoded_end(n_tokens + self.n_evicted, self.sink_tokens) - self.n_evicted
        n_leaving = max(0, end - self.encoded_end)
        self._encode(recent[:n_leaving], None if recent_kept is None else recent_kept[:n_leaving])
        self._sinks, self._recent, self.n_tokens = _owned(sinks), _owned(recent[n_leaving:]), n_tokens
        self._recent_kept = None if recent_kept is None else _owned(recent_kept[n_leaving:])

    def read(self, start: int, end: int) -> Float[Tensor, "tokens channels"]:
        """The tokens from `start` to before `end`, as attention reads them."""
        assert self._sinks is not None, "something is appended before it is read"
        assert self._recent is not None
        parts = [self._sinks[start:end]] if start < self.sink_tokens else []
        for first, codes in self._stored_blocks():
            if first < end and start < first + codes.shape[0]:
                parts.append(self._decode(first, codes)[max(0, start - first) : end - first])
        if end > self.encoded_end:
            parts.append(self._recent[max(0, start - self.encoded_end) : end - self.encoded_end])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode_all(self) -> Float[Tensor, "tokens channels"]:
        """All encoded tokens, which are read from here until `forget_decoded`."""
        parts = [self._decode(first, codes) for first, codes in self._stored_blocks()]
        assert self._recent is not None, "something is appended before it is decoded"
        self._decoded = torch.cat(parts) if parts else self._recent[:0]
        return self._decoded

    def forget_decoded(self) -> None:
        """Ends a step: what was decoded for others is let go."""
        self._context, self._decoded = no_context, None

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of tokens of at most a block and the sinks, from the first that is kept to the last."""
        start = self.first_token
        grid = self.sink_tokens + self._forgotten_blocks * self.block_tokens
        for end in range(grid + self.block_tokens, self.n_tokens, self.block_tokens):
            yield start, end
            start = end
        if start < self.n_tokens:
            yield start, self.n_tokens

    def codes(self) -> Codes | None:
        """All codes as one; None before a token has left the window."""
        return Codes.cat(self.blocks) if self.blocks else None

    @property
    def first_token(self) -> int:
        """The first token that has not been forgotten."""
        return self.sink_tokens + self._forgotten_blocks * self.block_tokens if self._forgotten_blocks else 0

    @property
    def n_encoded(self) -> int:
        """Tokens that are read from codes."""
        return sum(codes.shape[0] for codes in self.blocks) - self.n_small

    @property
    def n_small(self) -> int:
        """Tokens that have left the window and are read as they came, for the small norm of their keys."""
        return sum(len(rows) for rows in self._small())

    @property
    def n_exact(self) -> int:
        """Tokens that are read as they came."""
        return sum(len(rows) for rows in self._exact())

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all codes, those of tokens that are kept exact besides among them."""
        return sum(codes.nbytes for codes in self.blocks) - sum(rows.nbytes for rows in self._small())

    @property
    def exact_bytes(self) -> int:
        """Bytes of the tokens that are kept as they came."""
        return sum(rows.nbytes for rows in self._exact())

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is held, codes first."""
        for codes in self.blocks:
            yield from codes.all_tensors()
        yield from (rows for rows in (self._sinks, self._recent, self._recent_kept) if rows is not None)
        if self._state is not None:
            yield self._state.absmax

    def state(self) -> TokenState:
        """All that is held between two steps, for an empty store of the same site to go on from."""
        return TokenState(
            counts={name: getattr(self, name) for name in _COUNTS},
            exact={name: getattr(self, name) for name in _EXACT},
            blocks=self.blocks,
            running=self._state,
        )

    def restore(self, state: TokenState) -> None:
        """Holds what another store held, in place of its own."""
        for name, held in {**state.counts, **state.exact}.items():
            setattr(self, name, held)
        self.blocks, self._state, self._room = list(state.blocks), state.running, Room()

    def forget_before(self, token: int) -> None:
        """Drops the blocks whose tokens all come before `token`, and the sinks with the first of them."""
        while self.blocks and self.blocks[0].shape[0] == self.block_tokens:
            if self.sink_tokens + (self._forgotten_blocks + 1) * self.block_tokens > token:
                return
            self._forgotten_blocks += 1
            del self.blocks[0]
            self._sinks = None if self._sinks is None else self._sinks[:0].clone()

    def keep(self, kept: Bool[Tensor, " tokens"]) -> None:
        """Drops the tokens where `kept` is false, all of which are encoded; those after them move up.

        Raises
        ------
        ValueError
            If that would divide tokens that share scales.
        """
        dropped = (~kept).nonzero()[:, 0]
        if not len(dropped):
            return
        first = int(dropped[0] - self.sink_tokens) // self.block_tokens  # blocks before it stay as they are
        encoded = kept[self.sink_tokens + first * self.block_tokens : self.encoded_end]
        self.blocks, self._room = [*self.blocks[:first], *self._selected(self.blocks[first:], encoded)], Room()
        self.n_tokens -= len(dropped)
        self.encoded_end -= len(dropped)
        self.n_evicted += len(dropped)

    def _selected(self, blocks: list[Codes], kept: Bool[Tensor, " tokens"]) -> list[Codes]:
        """The blocks anew without the tokens where `kept` is false; codes that run on lose whole blocks alone."""
        if self._state is not None:
            parts = zip(blocks, kept.split(self.block_tokens), strict=True)
            return [codes.select(own) for codes, own in parts if own.any()]
        codes = Codes.cat(blocks).select(kept)
        block = torch.arange(codes.shape[0], device=kept.device) // self.block_tokens
        return [codes.select(block == index) for index in range(-(-codes.shape[0] // self.block_tokens))]

    def cropped(self, n_tokens: int) -> "TokenStore":
        """A copy with the first `n_tokens` only; a token that has been encoded stays so.

        Raises
        ------
        CacheStateError
            If that would divide tokens that share scales, or needs what has been forgotten.
        """
        other = self.copy()
        other.n_tokens = n_tokens = max(0, min(n_tokens, self.n_tokens))
        n_recent = max(0, n_tokens - self.encoded_end)
        if self._sinks is not None and self._recent is not None:
            other._sinks, other._recent = _owned(self._sinks[:n_tokens]), _owned(self._recent[:n_recent])
        if self._recent_kept is not None:
            other._recent_kept = _owned(self._recent_kept[:n_recent])
        other.encoded_end = max(self.sink_tokens, min(n_tokens, self.encoded_end))
        if other.encoded_end < self.encoded_end:
            other.blocks = list(self._blocks_before(other.encoded_end))
        return other

    def to(self, device: torch.device) -> "TokenStore":
        """A copy on another device; what belongs together is still encoded and read as before."""
        other = self.map(lambda tensor: tensor.to(device))
        other.quantizer = self.quantizer.to(device)
        return other

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenStore":
        """A copy with all that is held changed."""
        other = copy.copy(self)
        other._room = Room()
        other.blocks = [codes.map(change) for codes in self.blocks]
        for name in _EXACT:
            held = getattr(self, name)
            setattr(other, name, None if held is None else change(held))
        return other

    def copy(self) -> "TokenStore":
        """A copy that shares everything stored so far."""
        return self.map(lambda tensor: tensor)

    def _decode(self, first: int, codes: Codes) -> Tensor:
        """The tokens of a block, the first of which has the number `first`."""
        tokens = slice(first - self.sink_tokens, first - self.sink_tokens + codes.shape[0])
        if self._decoded is not None:
            return self._decoded[tokens]
        return self.quantizer.decode(codes, self._context(tokens))

    def _encode(self, rows: Tensor, kept: Tensor | None) -> None:
        """Codes of the next tokens, cut where blocks end."""
        while len(rows):
            room = self.block_tokens - (self.encoded_end - self.sink_tokens) % self.block_tokens
            codes = self._encoded(rows[:room], None if kept is None else kept[:room]).map(_owned)
            if room < self.block_tokens:
                codes = Codes.cat([self.blocks.pop(), codes], self._room.join)
            if codes.shape[0] == self.block_tokens:
                codes, self._room = codes.map(_owned), Room()
            self.blocks.append(codes)
            self.encoded_end += len(rows[:room])
            rows, kept = rows[room:], None if kept is None else kept[room:]

    def _encoded(self, rows: Tensor, kept: Tensor | None) -> Codes:
        if kept is None or not isinstance(self.quantizer, KeptExact):
            return self._encoded_by(self.quantizer, rows)
        codes = self._encoded_by(self.quantizer.inner, self.quantizer.stand_ins(rows, kept))
        return self.quantizer.joined(codes, rows, kept)

    def _encoded_by(self, quantizer: Quantizer, rows: Tensor) -> Codes:
        if self._state is None:
            start = self.encoded_end - self.sink_tokens
            return quantizer.encode(rows, self._context(slice(start, start + len(rows))))
        state = replace(self._state, absmax=self._state.absmax.to(rows.device))
        codes, self._state = encode_from(quantizer, rows, state)
        return codes

    def _small(self) -> Iterator[Tensor]:
        """Exact tokens among the codes."""
        if isinstance(self.quantizer, KeptExact):
            yield from (codes.tensors["values"] for codes in self.blocks)

    def _exact(self) -> Iterator[Tensor]:
        """All exact tokens."""
        yield from (rows for rows in (self._sinks, self._recent) if rows is not None)
        yield from self._small()

    def _stored_blocks(self) -> Iterator[tuple[int, Codes]]:
        first = self.sink_tokens + self._forgotten_blocks * self.block_tokens
        for codes in self.blocks:
            yield first, codes
            first += codes.shape[0]

    def _blocks_before(self, end: int) -> Iterator[Codes]:
        group = self.quantizer.tokens_per_scale or 1
        if (end - self.sink_tokens) % group or self._state is not None or end < self.first_token:
            remedy = "Crop to a whole group, or keep" if self._state is None else "No scale is taken back: keep"
            raise CacheStateError(
                f"{self.quantizer.label}: the cache cannot be cropped to {end} tokens: {self.encoded_end} are encoded, "
                f"in groups of {group} that share scales, from token {max(self.sink_tokens, self.first_token)} on. "
                f"{remedy} at least as many residual_tokens as are cropped at a time."
            )
        for first, codes in self._stored_blocks():
            if first + codes.shape[0] <= end:
                yield codes
            elif first < end:
                yield codes.first(end - first)


def _joined(held: Tensor | None, rows: Tensor) -> Tensor:
    return rows if held is None or not len(held) else torch.cat([held, rows]) if len(rows) else held


def _owned(x: Tensor) -> Tensor:
    """`x` in memory of its own: a part of a larger tensor would keep all of it alive."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
