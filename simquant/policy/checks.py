"""Checks of quantizers against a model's layers and a policy, and the policy that they ask for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from artifacts.artifact import Artifact
from artifacts.errors import MismatchError
from artifacts.model.attention import AttentionLayer
from artifacts.model.fingerprint import model_fingerprint
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.policy.policy import CachePolicy


def check_fit(
    model: nn.Module,
    quantizers: Artifact | Mapping[Site, Quantizer],
    layers: Sequence[AttentionLayer],
) -> None:
    """The quantizers were made for the model, and for all of its layers.

    Raises
    ------
    MismatchError
        If the artifact was made for another model, or covers only some layers.
    """
    if isinstance(quantizers, Artifact):
        quantizers.check_model(model_fingerprint(model, layers, None))
    check_coverage(quantizers, layers)


def check_coverage(quantizers: Mapping[Site, Quantizer], layers: Sequence[AttentionLayer]) -> None:
    """There is one quantizer for the keys and one for the values of every layer.

    Raises
    ------
    MismatchError
        If some are missing, or stand for layers that the model does not have.
    """
    for site in quantizers:
        if site.tensor == "query" or (site.stage == "post_rope" and Site(site.layer, "key", "pre_rope") in quantizers):
            raise MismatchError(
                f"artifact: {site} cannot be quantized: queries are not cached, and keys at one stage only"
            )
    wanted = {(layer.layer, tensor) for layer in layers for tensor in ("key", "value")}
    given = {(site.layer, site.tensor) for site in quantizers}
    exact = "A layer that shall stay exact carries the quantizer 'identity'; otherwise calibrate all layers."
    for problem, places, advice in (
        ("covers only some layers; missing", wanted - given, exact),
        ("has no place in the model for", given - wanted, "Was it made for another model?"),
    ):
        if places:
            names = ", ".join(f"layers.{layer}.{tensor}" for layer, tensor in sorted(places)[:6])
            raise MismatchError(f"artifact: it {problem} {names}{', ...' if len(places) > 6 else ''}. {advice}")


def check_cacheable(quantizers: Mapping[Site, Quantizer], policy: CachePolicy) -> None:
    """A cache under the policy can hand every quantizer what it encodes together.

    Raises
    ------
    MismatchError
        If scales span all tokens of a call, or groups of tokens that do not fill the blocks of the window; or if a
        site is predicted from others under a policy that treats their tokens differently.
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
        if quantizer.sources and not _alike_everywhere(policy):
            raise MismatchError(
                f"{who} is predicted from {', '.join(map(str, quantizer.sources))}, whose tokens must be encoded when "
                f"its own are; got a policy with {policy.describe()}. Use one window for keys and values, without "
                "eviction and without tokens kept for their small norm."
            )


def default_policy(
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    entry: Mapping[str, Any] | None = None,
    sinks_alone: bool = False,
) -> CachePolicy:
    """The policy that goes with quantizers where none is given.

    Parameters
    ----------
    quantizers : Artifact or mapping from Site to Quantizer
        The sinks are an artifact's; without an entry, tokens leave at once, in the fewest whole groups.
    entry : mapping or None
        What a recipe says under `cache`; None takes what the artifact's own says.
    sinks_alone : bool
        Whatever a recipe says, every other token is encoded before it is read, as the protocol 'full' does.

    Raises
    ------
    ValueError
        If the entry is none.
    """
    manifest = quantizers.manifest if isinstance(quantizers, Artifact) else None
    sink_tokens = 0 if manifest is None else manifest.sink_tokens
    if sinks_alone:
        return CachePolicy(sink_tokens=sink_tokens)
    if entry is None and manifest is not None:
        entry = manifest.recipe.get("cache")
    if entry is None:
        return CachePolicy(sink_tokens=sink_tokens, block_tokens=group_tokens(quantizers))
    return CachePolicy.from_entry(entry, sink_tokens)


def _alike_everywhere(policy: CachePolicy) -> bool:
    """Whether every site encodes the same tokens at the same step."""
    return policy.values is None and policy.eviction is None and not policy.keep_smallest_norm


def group_tokens(quantizers: Mapping[Site, Quantizer]) -> int:
    """The fewest tokens that are whole groups for all quantizers with scales over groups of tokens."""
    return math.lcm(*(quantizer.tokens_per_scale or 1 for quantizer in quantizers.values()))
