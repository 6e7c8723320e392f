"""Which tokens stay exact, and when the others are encoded."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from simquant.policy.eviction import Eviction

TENSORS: tuple[Literal["key"], Literal["value"]] = ("key", "value")
"""What is cached."""


@dataclass(frozen=True, kw_only=True)
class ResidualWindow:
    """How the recent tokens of a sequence leave full precision.

    Parameters
    ----------
    residual_tokens : int
        Most recent tokens that stay exact, a step's own among them.
    block_tokens : int
        How many tokens leave at once, counted from the first that is no sink; 1 is token by token. Up to
        `block_tokens - 1` more than `residual_tokens` are exact meanwhile.
    """

    residual_tokens: int = 0
    block_tokens: int = 1

    def __post_init__(self) -> None:
        _check_fields(self)

    def encoded_end(self, n_tokens: int, sink_tokens: int) -> int:
        """Where the encoded tokens of a sequence of `n_tokens` end; they begin after the sinks."""
        leaving = max(0, n_tokens - self.residual_tokens - sink_tokens)
        return sink_tokens + leaving - leaving % self.block_tokens


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """Tokens that a cache keeps in full precision; all others are encoded at once.

    Parameters
    ----------
    sink_tokens : int
        First positions of each sequence that stay exact, counted from its first real token.
    residual_tokens, block_tokens : int
        See `ResidualWindow`: the recent tokens that stay exact, and how many leave at once.
    values : ResidualWindow or None
        Another window for the values; None is that of the keys. KIVI, which encodes after a step has read, keeps
        keys by `residual_tokens=1, block_tokens=R` and values by `ResidualWindow(residual_tokens=R + 1)`.
    exact_prefill : bool
        The step that fills an empty cache reads exact keys and values, whatever is stored; otherwise it reads what
        later steps will read.
    eviction : Eviction or None
        Which encoded tokens are dropped for good; in a packed cache only.
    keep_smallest_norm : int
        Tokens whose key, as it came, was among this many smallest so far in its sequence and layer stay exact, with
        their values; see `SmallNorms`. Keys of small norm draw much attention, and stretch scales per channel. 0: none.
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
        """What a recipe says under `cache`, with its sinks.

        Raises
        ------
        ValueError
            If an entry is unknown or out of range.
        """
        reserved = {"sink_tokens", "eviction"} & entry.keys()
        if reserved:
            raise ValueError(f"{cls.__name__}: a recipe's cache entry does not say {', '.join(sorted(reserved))}")
        values = entry.get("values")
        try:
            window = None if values is None else ResidualWindow(**values)
            return cls(**{**entry, "values": window}, sink_tokens=sink_tokens)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: a recipe's cache entry has the fields of a policy; {error}") from error

    def window(self, tensor: Literal["key", "value", "query"]) -> ResidualWindow:
        """The window of keys or of values."""
        if tensor == "value" and self.values is not None:
            return self.values
        return ResidualWindow(residual_tokens=self.residual_tokens, block_tokens=self.block_tokens)

    def exact_tokens(self, tensor: Literal["key", "value"], n_tokens: int) -> int:
        """How many of `n_tokens` stay exact, those of small norm left out."""
        return n_tokens - max(0, self.window(tensor).encoded_end(n_tokens, self.sink_tokens) - self.sink_tokens)

    @property
    def encodes_at_once(self) -> bool:
        """Whether every token but the sinks is encoded before any query reads it."""
        windows = {self.window("key"), self.window("value")}
        exempt = self.exact_prefill or self.keep_smallest_norm
        return windows == {ResidualWindow()} and not exempt and self.eviction is None

    def describe(self) -> str:
        """One phrase for reports."""
        sinks = "first token exact" if self.sink_tokens == 1 else f"first {self.sink_tokens} tokens exact"
        key, value = (self._describe(self.window(tensor)) for tensor in TENSORS)
        windows = [key] if key == value else [f"keys: {key or 'no recent'}", f"values: {value or 'no recent'}"]
        small = f"tokens whose key is among the {self.keep_smallest_norm} smallest so far exact"
        parts = [*([sinks] if self.sink_tokens else []), *(part for part in windows if part)]
        parts += [small] if self.keep_smallest_norm else []
        kept = ", ".join(parts) if parts else "no token exempt"
        return kept if self.eviction is None else f"{kept}; {self.eviction.describe()}"

    def describe_prefill(self) -> str:
        """What the first step reads, for reports."""
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
            raise ValueError(f"{who}: {field.name} must be an integer from {least}; got {value!r}")
        if field.type is bool and type(value) is not bool:  # any text of a file would pass for true
            raise ValueError(f"{who}: {field.name} must be true or false; got {value!r:.60}")
