"""Tokens of one sequence at one site: sinks in full precision, blocks of codes, residual window."""

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
    """Empty context of a site that is not predicted."""
    return ()


class TokenStore:
    """Append-only storage in which every token is encoded once, when it leaves the residual window.

    Stored tensors are never changed in place, so that copies (beams) share them.

    Parameters
    ----------
    quantizer : Quantizer
        Quantizer of the site, with tensors on the device of the tokens.
    policy : CachePolicy
        Tokens kept in full precision.
    window : ResidualWindow
        The policy's residual window for this site.
    block_tokens : int
        Tokens decoded at a time; a multiple of the tokens that share a scale.
    """

    def __init__(self, quantizer: Quantizer, policy: CachePolicy, window: ResidualWindow, block_tokens: int) -> None:
        self.quantizer = KeptExact.around(quantizer) if policy.keep_smallest_norm else quantizer
        self.window, self.block_tokens = window, block_tokens
        self.sink_tokens = self.encoded_end = policy.sink_tokens
        self.n_tokens = self.n_evicted = 0  # tokens are counted without evicted ones
        self.blocks: list[Codes] = []
        self._sinks: Tensor | None = None
        self._recent: Tensor | None = None
        self._recent_kept: Tensor | None = None
        self._forgotten_blocks = 0
        self._state = first_state(quantizer)
        self._context: Callable[[slice], Context] = no_context
        self._decoded: Tensor | None = None
        self._room = Room()  # buffers of the last block, which is not full

    def append(
        self,
        rows: Float[Tensor, "tokens channels"],
        kept: Bool[Tensor, " tokens"] | None = None,
        context: Callable[[slice], Context] = no_context,
    ) -> None:
        """Appends tokens, and encodes those that leave the residual window.

        Tokens where `kept` is true are read in full precision for good, under a policy with `keep_smallest_norm`.
        `context` gives the decoded sources of a predicted site for encoded tokens, counted from the first after sinks.
        """
        self._context, self._decoded = context, None
        n_sinks = min(len(rows), max(0, self.sink_tokens - self.n_tokens))
        sinks = _joined(self._sinks, rows[:n_sinks])
        recent = _joined(self._recent, rows[n_sinks:])
        recent_kept = None if kept is None else _joined(self._recent_kept, kept[n_sinks:])
        n_tokens = self.n_tokens + len(rows)
        # The window counts tokens of the text; stored tokens are counted without the evicted ones, all of them encoded.
        end = self.window.encoded_end(n_tokens + self.n_evicted, self.sink_tokens) - self.n_evicted
        n_leaving = max(0, end - self.encoded_end)
        self._encode(recent[:n_leaving], None if recent_kept is None else recent_kept[:n_leaving])
        self._sinks, self._recent, self.n_tokens = _owned(sinks), _owned(recent[n_leaving:]), n_tokens
        self._recent_kept = None if recent_kept is None else _owned(recent_kept[n_leaving:])

    def read(self, start: int, end: int) -> Float[Tensor, "tokens channels"]:
        """Tokens of the range [start, end): sinks and window in full precision, the others decoded."""
        assert self._sinks is not None, "tokens are appended before they are read"
        assert self._recent is not None
        parts = [self._sinks[start:end]] if start < self.sink_tokens else []
        for first, codes in self.stored_blocks():
            if first < end and start < first + codes.shape[0]:
                parts.append(self._decode(first, codes)[max(0, start - first) : end - first])
        if end > self.encoded_end:
            parts.append(self._recent[max(0, start - self.encoded_end) : end - self.encoded_end])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode_all(self) -> Float[Tensor, "tokens channels"]:
        """All encoded tokens, decoded at once and held until `forget_decoded`."""
        parts = [self._decode(first, codes) for first, codes in self.stored_blocks()]
        assert self._recent is not None, "tokens are appended before they are decoded"
        self._decoded = torch.cat(parts) if parts else self._recent[:0]
        return self._decoded

    def forget_decoded(self) -> None:
        """Ends a step: frees the decoded tokens."""
        self._context, self._decoded = no_context, None

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of tokens to decode together, of a block each; the first also covers the sinks."""
        # Ranges end on the grid of the blocks of codes, so that each block is decoded once.
        start = self.first_token
        grid = self.sink_tokens + self._forgotten_blocks * self.block_tokens
        for end in range(grid + self.block_tokens, self.n_tokens, self.block_tokens):
            yield start, end
            start = end
        if start < self.n_tokens:
            yield start, self.n_tokens

    def codes(self) -> Codes | None:
        """All codes concatenated; None before a token has left the residual window."""
        return Codes.cat(self.blocks) if self.blocks else None

    def stored_blocks(self) -> Iterator[tuple[int, Codes]]:
        """Blocks of codes, each with the number of its first token."""
        first = self.sink_tokens + self._forgotten_blocks * self.block_tokens
        for codes in self.blocks:
            yield first, codes
            first += codes.shape[0]

    @property
    def first_token(self) -> int:
        """First token that is still stored."""
        return self.sink_tokens + self._forgotten_blocks * self.block_tokens if self._forgotten_blocks else 0

    @property
    def n_encoded(self) -> int:
        """Number of tokens that are read from codes."""
        return sum(codes.shape[0] for codes in self.blocks) - self.n_small

    @property
    def n_small(self) -> int:
        """Number of tokens that have left the window and are kept in full precision for their small key norms."""
        return sum(len(rows) for rows in self._small())

    @property
    def n_exact(self) -> int:
        """Number of tokens that are read in full precision."""
        return sum(len(rows) for rows in self._exact())

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all codes, including the unread codes of tokens with small key norms."""
        return sum(codes.nbytes for codes in self.blocks) - sum(rows.nbytes for rows in self._small())

    @property
    def exact_bytes(self) -> int:
        """Bytes of the tokens in full precision."""
        return sum(rows.nbytes for rows in self._exact())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the store, codes first."""
        for codes in self.blocks:
            yield from codes.all_tensors()
        yield from (rows for rows in (self._sinks, self._recent, self._recent_kept) if rows is not None)
        if self._state is not None:
            yield self._state.absmax

    def state(self) -> TokenState:
        """State between two steps, to restore in an empty store of the same site."""
        return TokenState(
            counts={name: getattr(self, name) for name in _COUNTS},
            exact={name: getattr(self, name) for name in _EXACT},
            blocks=self.blocks,
            running=self._state,
        )

    def restore(self, state: TokenState) -> None:
        """Replaces the state by that of another store."""
        for name, held in {**state.counts, **state.exact}.items():
            setattr(self, name, held)
        self.blocks, self._state, self._room = list(state.blocks), state.running, Room()

    def forget_before(self, token: int) -> None:
        """Drops the blocks whose tokens all precede `token`, and the sinks with the first of them."""
        while self.blocks and self.blocks[0].shape[0] == self.block_tokens:
            if self.sink_tokens + (self._forgotten_blocks + 1) * self.block_tokens > token:
                return
            self._forgotten_blocks += 1
            del self.blocks[0]
            self._sinks = None if self._sinks is None else self._sinks[:0].clone()

    def keep(self, kept: Bool[Tensor, " tokens"]) -> None:
        """Evicts the tokens where `kept` is false, all of which are encoded; later tokens move up.

        Raises
        ------
        ValueError
            If that would split tokens that share scales.
        """
        # Blocks before the first evicted token are unchanged; the codes after it are selected and cut into blocks anew.
        dropped = (~kept).nonzero()[:, 0]
        if not len(dropped):
            return
        first = int(dropped[0] - self.sink_tokens) // self.block_tokens
        encoded = kept[self.sink_tokens + first * self.block_tokens : self.encoded_end]
        self.blocks, self._room = [*self.blocks[:first], *self._selected(self.blocks[first:], encoded)], Room()
        self.n_tokens -= len(dropped)
        self.encoded_end -= len(dropped)
        self.n_evicted += len(dropped)

    def _selected(self, blocks: list[Codes], kept: Bool[Tensor, " tokens"]) -> list[Codes]:
        """Blocks of the tokens where `kept` is true; codes with running scales lose whole blocks only."""
        if self._state is not None:
            parts = zip(blocks, kept.split(self.block_tokens), strict=True)
            return [codes.select(own) for codes, own in parts if own.any()]
        # Cut into blocks again, so that each is decoded in one call and groups of tokens stay inside a block.
        codes = Codes.cat(blocks).select(kept)
        block = torch.arange(codes.shape[0], device=kept.device) // self.block_tokens
        return [codes.select(block == index) for index in range(-(-codes.shape[0] // self.block_tokens))]

    def cropped(self, n_tokens: int) -> "TokenStore":
        """Copy with the first `n_tokens` only; encoded tokens stay encoded.

        Raises
        ------
        CacheStateError
            If that would split tokens that share scales, or needs dropped tokens.
        """
        other = self.copy()
        other.n_tokens = n_tokens = max(0, min(n_tokens, self.n_tokens))
        # A token that has been encoded is not restored to full precision: the cropped cache differs from one that never
        # held the later tokens by that alone.
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
        """Copy on another device."""
        other = self.map(lambda tensor: tensor.to(device))
        other.quantizer = self.quantizer.to(device)
        return other

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenStore":
        """Copy with a function applied to every tensor."""
        other = copy.copy(self)
        other._room = Room()
        other.blocks = [codes.map(change) for codes in self.blocks]
        for name in _EXACT:
            held = getattr(self, name)
            setattr(other, name, None if held is None else change(held))
        return other

    def copy(self) -> "TokenStore":
        """Copy that shares the tensors stored so far."""
        return self.map(lambda tensor: tensor)

    def _decode(self, first: int, codes: Codes) -> Tensor:
        """Decoded tokens of the block that begins at token `first`."""
        tokens = slice(first - self.sink_tokens, first - self.sink_tokens + codes.shape[0])
        if self._decoded is not None:
            return self._decoded[tokens]
        return self.quantizer.decode(codes, self._context(tokens))

    def _encode(self, rows: Tensor, kept: Tensor | None) -> None:
        """Encodes the next tokens, and appends their codes to the blocks."""
        # Every token is encoded once, with the scales it has then; a partial block grows by concatenation of codes in
        # spare capacity (`Room`), and is copied to its exact size when it is full.
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
        return self.quantizer.joined(codes, rows[kept], kept)

    def _encoded_by(self, quantizer: Quantizer, rows: Tensor) -> Codes:
        if self._state is None:
            start = self.encoded_end - self.sink_tokens
            return quantizer.encode(rows, self._context(slice(start, start + len(rows))))
        state = replace(self._state, absmax=self._state.absmax.to(rows.device))
        codes, self._state = encode_from(quantizer, rows, state)
        return codes

    def _small(self) -> Iterator[Tensor]:
        """Full-precision tokens stored with the codes, for their small key norms."""
        if isinstance(self.quantizer, KeptExact):
            yield from (codes.tensors["values"] for codes in self.blocks)

    def _exact(self) -> Iterator[Tensor]:
        """All tokens in full precision."""
        yield from (rows for rows in (self._sinks, self._recent) if rows is not None)
        yield from self._small()

    def _blocks_before(self, end: int) -> Iterator[Codes]:
        group = self.quantizer.tokens_per_scale or 1
        if (end - self.sink_tokens) % group or self._state is not None or end < self.first_token:
            remedy = "Crop to a whole group, or keep" if self._state is None else "Running scales cannot go back: keep"
            raise CacheStateError(
                f"{self.quantizer.label}: cannot crop to {end} tokens: {self.encoded_end} are encoded, in groups of "
                f"{group} that share scales, from token {max(self.sink_tokens, self.first_token)} on. {remedy} at "
                "least as many residual_tokens as are cropped at a time."
            )
        for first, codes in self.stored_blocks():
            if first + codes.shape[0] <= end:
                yield codes
            elif first < end:
                yield codes.first(end - first)


def _joined(held: Tensor | None, rows: Tensor) -> Tensor:
    return rows if held is None or not len(held) else torch.cat([held, rows]) if len(rows) else held


def _owned(x: Tensor) -> Tensor:
    """`x` in memory of its own: a part of a larger tensor would keep all of it alive."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
