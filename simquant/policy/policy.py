"""Cache policy: sink tokens and residual window in full precision, block size of encoding, eviction."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from artifacts.errors import InvalidValueError
from simquant.policy.eviction import Eviction

TENSORS: tuple[Literal["key"], Literal["value"]] = ("key", "value")
"""Tensors of a KV cache."""


@dataclass(frozen=True, kw_only=True)
class ResidualWindow:
    """Residual window of KIVI: the most recent tokens of a sequence, held in full precision until they are encoded.

    Parameters
    ----------
    residual_tokens : int
        Most recent tokens held in full precision, those of the running step included.
    block_tokens : int
        Tokens encoded together, counted from the first after the sinks; 1 encodes token by token. Until a block is
        full, up to `block_tokens - 1` tokens more than `residual_tokens` are in full precision.
    """

    residual_tokens: int = 0
    block_tokens: int = 1

    def __post_init__(self) -> None:
        _check_fields(self)

    def encoded_end(self, n_tokens: int, sink_tokens: int) -> int:
        """End of the encoded range in a sequence of `n_tokens`; it begins after the sinks."""
        # Whole blocks only: tokens that have left the window wait in full precision until their block is complete, so
        # that a group which shares a scale is encoded at once (KIVI, 2402.02750).
        leaving = max(0, n_tokens - self.residual_tokens - sink_tokens)
        return sink_tokens + leaving - leaving % self.block_tokens


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """Rules for the tokens kept in full precision and for eviction; every other token is encoded at once.

    Parameters
    ----------
    sink_tokens : int
        First tokens of each sequence kept in full precision (attention sinks), padding not counted.
    residual_tokens, block_tokens : int
        Residual window and block size of encoding; see `ResidualWindow`.
    values : ResidualWindow or None
        Residual window of the values; None takes that of the keys. KIVI encodes after attention has run: its keys are
        `residual_tokens=1, block_tokens=R`, its values `ResidualWindow(residual_tokens=R + 1)`.
    exact_prefill : bool
        Prefill attends to keys and values in full precision, and stores codes. Otherwise prefill attends to the
        decoded ones, as later steps do.
    eviction : Eviction or None
        Tokens to drop for good; in a packed cache only.
    keep_smallest_norm : int
        Keep in full precision the tokens whose key norm is among the N smallest seen so far in their sequence and
        layer, keys and values; see `SmallNorms`. Keys of small norm attract much attention, and widen the range of
        scales per channel. 0: none.
    """

    sink_tokens: int = 0
    residual_tokens: int = 0
    block_tokens: int = 1
    values: ResidualWindow | None = None
    exact_prefill: bool = False
    eviction: Eviction | None = None
    keep_smallest_norm: int = 0

    def __post_init__(self) -> None:
        _check_fields(self)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], sink_tokens: int) -> "CachePolicy":
        """Policy from the `cache` entry of a recipe, with the recipe's number of sinks.

        Raises
        ------
        ValueError
            If an entry is unknown or out of range.
        """
        reserved = {"sink_tokens", "eviction"} & entry.keys()
        if reserved:
            raise InvalidValueError(
                f"{cls.__name__}: expected a cache entry of a recipe without {', '.join(sorted(reserved))}; got "
                f"{', '.join(sorted(entry))}. Set the sinks at the top of the recipe, and eviction where the cache is "
                "made."
            )
        values = entry.get("values")
        try:
            window = None if values is None else ResidualWindow(**values)
            return cls(**{**entry, "values": window}, sink_tokens=sink_tokens)
        except TypeError as error:
            raise InvalidValueError(
                f"{cls.__name__}: expected a cache entry of a recipe with fields of a policy; {error}. Remove the "
                "unknown field."
            ) from error

    def window(self, tensor: Literal["key", "value", "query"]) -> ResidualWindow:
        """Residual window of the keys or of the values."""
        if tensor == "value" and self.values is not None:
            return self.values
        return ResidualWindow(residual_tokens=self.residual_tokens, block_tokens=self.block_tokens)

    def exact_tokens(self, tensor: Literal["key", "value"], n_tokens: int) -> int:
        """Number of tokens in full precision among `n_tokens`, those with small key norms left out."""
        return n_tokens - max(0, self.window(tensor).encoded_end(n_tokens, self.sink_tokens) - self.sink_tokens)

    @property
    def encodes_at_once(self) -> bool:
        """True if every token but the sinks is encoded before any query reads it."""
        windows = {self.window("key"), self.window("value")}
        exempt = self.exact_prefill or self.keep_smallest_norm
        return windows == {ResidualWindow()} and not exempt and self.eviction is None

    def describe(self) -> str:
        """Phrase for reports."""
        sinks = "first token exact" if self.sink_tokens == 1 else f"first {self.sink_tokens} tokens exact"
        key, value = (self._describe(self.window(tensor)) for tensor in TENSORS)
        windows = [key] if key == value else [f"keys: {key or 'no recent'}", f"values: {value or 'no recent'}"]
        small = f"tokens whose key norm is among the {self.keep_smallest_norm} smallest so far exact"
        parts = [*([sinks] if self.sink_tokens else []), *(part for part in windows if part)]
        parts += [small] if self.keep_smallest_norm else []
        kept = ", ".join(parts) if parts else "no token exempt"
        return kept if self.eviction is None else f"{kept}; {self.eviction.describe()}"

    def describe_prefill(self) -> str:
        """Phrase for reports: precision of the keys and values that prefill attends to."""
        return "exact prefill attention" if self.exact_prefill else "quantized prefill"

    @staticmethod
    def _describe(window: ResidualWindow) -> str:
        n = window.residual_tokens
        recent = "last token exact" if n == 1 else f"last {n} tokens exact" if n else ""
        blocks = f"encoded in blocks of {window.block_tokens}" if window.block_tokens > 1 else ""
        return " and ".join(part for part in (recent, blocks) if part)


def _check_fields(policy: CachePolicy | ResidualWindow) -> None:
    who = type(policy).__name__
    for field in fields(policy):
        value, least = getattr(policy, field.name), 1 if field.name == "block_tokens" else 0
        if field.type is int and (type(value) is not int or value < least):
            raise InvalidValueError(f"{who}: {field.name} must be an integer from {least}; got {value!r}")
        if field.type is bool and type(value) is not bool:  # any text of a file would pass for true
            raise InvalidValueError(f"{who}: {field.name} must be true or false; got {value!r:.60}")
