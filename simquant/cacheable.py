"""Which quantizers a packed cache can hold, and under which policy."""

import math
from collections.abc import Iterator, Mapping

from artifacts.errors import MismatchError
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.streaming import Streaming
from simquant.policy import CachePolicy


def check_cacheable(quantizers: Mapping[Site, Quantizer], policy: CachePolicy) -> None:
    """A cache under the policy can hand every quantizer what it encodes together.

    Raises
    ------
    MismatchError
        If scales span all tokens of a call, or groups of tokens that do not fill the blocks of the window; or if a
        quantizer wants the context of earlier sites, or a running state inside a wrapper, which a cache does not keep.
    """
    for site, quantizer in quantizers.items():
        who, group = f"{site}: {quantizer.spec.describe()}", quantizer.tokens_per_scale
        block_tokens = policy.window(site.tensor).block_tokens
        if group is None:
            raise MismatchError(
                f"{who} shares scales among all tokens, later ones included: no cache can do that. Use scales of one "
                "token, of groups of tokens (group_size) or calibrated ones, or the protocol 'full'."
            )
        if block_tokens % group:
            raise MismatchError(
                f"{who} encodes groups of {group} tokens, the policy hands over {block_tokens} at once; they would "
                f"leave the window in the middle of a group. Use block_tokens={group} or a multiple of it."
            )
        if quantizer.sources:
            raise MismatchError(
                f"{who} predicts from {', '.join(map(str, quantizer.sources))}, which a cache does not hand over. Use "
                "the protocol 'full'."
            )
        if any(isinstance(inner, Streaming) for inner in _wrapped(quantizer)):
            raise MismatchError(
                f"{who}: scales that go on from chunk to chunk cannot be wrapped in a cache, which would start them "
                "anew. Drop the wrapper, or use the protocol 'full'."
            )


def group_tokens(quantizers: Mapping[Site, Quantizer]) -> int:
    """The fewest tokens that are whole groups for all quantizers with scales over groups of tokens."""
    return math.lcm(*(quantizer.tokens_per_scale or 1 for quantizer in quantizers.values()))


def _wrapped(quantizer: Quantizer) -> Iterator[Quantizer]:
    for value in vars(quantizer).values():
        if isinstance(value, Quantizer):
            yield value
            yield from _wrapped(value)
