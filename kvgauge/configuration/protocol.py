"""The protocol of an evaluation: tokens in full precision, tokens that are dropped, and chunks of the text."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvgauge.configuration.eviction import EvictionConfig
from kvgauge.configuration.fields import flag
from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site
    from simquant import Eviction
    from simquant.protocols.protocol import ProtocolName

OF_STEPS = (
    "residual_tokens",
    "block_tokens",
    "residual_length",
    "keep_smallest_norm",
    "prefill_tokens",
    "chunk_tokens",
    "exact_prefill",
)
"""Names of the options that the protocol 'full' has no use for."""


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """A protocol; what is None is as the recipe says, and a step of one token.

    Parameters
    ----------
    protocol : {'full', 'decode', 'cache'}
        See `simquant.evaluate`.
    residual_tokens, block_tokens : int or None
        Recent tokens that stay in full precision, and tokens that are encoded at once.
    residual_length : int or None
        Both, as KIVI has them.
    keep_smallest_norm : int or None
        Tokens kept exact for the small norm of their keys.
    prefill_tokens, chunk_tokens : int or None
        Tokens of the first step, and of each later one.
    exact_prefill : bool or None
        The first step reads exact keys and values.
    eviction : EvictionConfig
        Tokens that are dropped.
    """

    protocol: "ProtocolName" = "full"
    residual_tokens: int | None = None
    block_tokens: int | None = None
    residual_length: int | None = None
    keep_smallest_norm: int | None = None
    prefill_tokens: int | None = None
    chunk_tokens: int | None = None
    exact_prefill: bool | None = None
    eviction: EvictionConfig = field(default_factory=EvictionConfig)


def protocol_settings(
    config: ProtocolConfig,
    quantizers: "Mapping[Site, Quantizer]",
    sink_tokens: int,
    cache: Mapping[str, Any] | None = None,
    *,
    answering: bool = False,
) -> dict[str, Any]:
    """Policy, protocol and chunking, as `simquant.evaluate` takes them.

    Parameters
    ----------
    config : ProtocolConfig
        What was asked for.
    quantizers : Artifact or mapping from Site to Quantizer
        An artifact's recipe says which tokens stay in full precision where no option does.
    sink_tokens : int
        First tokens that stay in full precision.
    cache : mapping or None
        A recipe's entry `cache`, for quantizers without an artifact.
    answering : bool
        Tasks are asked, whose prompts are one step each, of any length.

    Raises
    ------
    UsageError
        If windows, steps or eviction are asked for under a protocol that has none, or two windows.
    """
    from simquant import CachePolicy, Chunking
    from simquant.policy.checks import default_policy

    named = [flag(name) for name in OF_STEPS if getattr(config, name) is not None]
    if config.protocol == "full" and named:
        flags = ", ".join(named)
        raise UsageError(
            f"{flags}: no effect with --protocol full, which quantizes all tokens at once; use --protocol decode or "
            "cache"
        )
    eviction = _eviction(config, answering=answering)
    if config.protocol == "full":
        return {"policy": CachePolicy(sink_tokens=sink_tokens)}
    changes = _window(config, quantizers)
    for name in ("exact_prefill", "keep_smallest_norm"):
        if getattr(config, name) is not None:
            changes[name] = getattr(config, name)
    policy = replace(default_policy(quantizers, entry=cache), sink_tokens=sink_tokens, eviction=eviction, **changes)
    chunking = Chunking(prefill_tokens=config.prefill_tokens or 1, chunk_tokens=config.chunk_tokens or 1)
    return {"policy": policy, "protocol": config.protocol, "chunking": chunking}


def _window(config: ProtocolConfig, quantizers: "Mapping[Site, Quantizer]") -> dict[str, Any]:
    """The windows that are asked for, which replace those of the recipe; nothing where none are."""
    from simquant.policy.checks import group_tokens
    from simquant.policy.policy import ResidualWindow

    if config.residual_length is not None:
        if config.residual_tokens is not None or config.block_tokens is not None:
            raise UsageError("--residual-length sets both windows; remove --residual-tokens and --block-tokens")
        # KIVI appends a token, attends, and quantizes afterwards: the newest key, and the value that is about to leave,
        # are still exact in their step. Hence 1 beside blocks of N for keys, and N + 1 for values.
        values = ResidualWindow(residual_tokens=config.residual_length + 1)
        return {"residual_tokens": 1, "block_tokens": config.residual_length, "values": values}
    if config.residual_tokens is None and config.block_tokens is None:
        return {}
    block_tokens = config.block_tokens or group_tokens(quantizers)
    return {"residual_tokens": config.residual_tokens or 0, "block_tokens": block_tokens, "values": None}


def _eviction(config: ProtocolConfig, *, answering: bool) -> "Eviction | None":
    """The eviction that is asked for; None where none is.

    Raises
    ------
    UsageError
        If it is asked for under another protocol than 'cache', or would never drop anything, or is none.
    """
    asked = config.eviction.given
    if not asked:
        return None
    flags = ", ".join(map(flag, asked))
    if config.protocol != "cache":
        raise UsageError(f"{flags}: tokens are dropped only from a cache; add --protocol cache")
    from simquant import from_scope_options

    try:
        eviction = from_scope_options(**asked)
    except ValueError as error:
        raise UsageError(f"{flags}: {error}") from error
    if eviction.prefill == "all" and eviction.decoding is None:
        raise UsageError(
            f"{flags}: no token would ever be dropped; add --decoding-metric, or a --method other than ALLKV"
        )
    first = config.prefill_tokens or 1
    if eviction.prefill != "all" and not answering and first <= eviction.prefill_tokens:
        raise UsageError(
            f"{flags}: the prompt has {first} tokens and {eviction.prefill_tokens} may be kept, so that none is "
            "dropped; raise --prefill-tokens, the length of the prompt, or lower --max-capacity-prompt"
        )
    return eviction
