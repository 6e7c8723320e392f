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
    """Check that the quantizers were made for the model, and cover all of its layers.

    Raises
    ------
    MismatchError
        If the artifact was made for another model, or covers only some layers.
    """
    if isinstance(quantizers, Artifact):
        quantizers.check_model(model_fingerprint(model, layers, None))
    check_coverage(quantizers, layers)


def check_coverage(quantizers: Mapping[Site, Quantizer], layers: Sequence[AttentionLayer]) -> None:
    """Check that there is one quantizer for the keys and one for the values of every layer.

    Raises
    ------
    MismatchError
        If some are missing, or stand for layers that the model does not have.
    """
    for site in quantizers:
        if site.tensor == "query" or (site.stage == "post_rope" and Site(site.layer, "key", "pre_rope") in quantizers):
            raise MismatchError(
                f"artifact: expected quantizers of cached keys and values, keys either before or after RoPE; got {site}"
                f"{' beside its key before RoPE' if site.tensor == 'key' else ', and queries are not cached'}. Remove "
                "that quantizer."
            )
    wanted = {(layer.layer, tensor) for layer in layers for tensor in ("key", "value")}
    given = {(site.layer, site.tensor) for site in quantizers}
    advice_missing = "Calibrate all layers, and give the quantizer 'identity' to one that shall keep full precision."
    advice_extra = "Use an artifact that was calibrated on this model."
    for problem, places, advice in (
        ("expected quantizers for every layer; missing are", wanted - given, advice_missing),
        ("expected quantizers of this model's layers alone; got others, for", given - wanted, advice_extra),
    ):
        if places:
            names = ", ".join(f"layers.{layer}.{tensor}" for layer, tensor in sorted(places)[:6])
            raise MismatchError(f"artifact: {problem} {names}{', ...' if len(places) > 6 else ''}. {advice}")


def check_cacheable(quantizers: Mapping[Site, Quantizer], policy: CachePolicy) -> None:
    """Check that a cache under the policy can encode together all tokens that share a scale.

    Raises
    ------
    MismatchError
        If scales span all tokens of a call, or groups of tokens that do not divide the window's blocks; or if a site
        is predicted from others under a policy that encodes their tokens at other steps.
    """
    for site, quantizer in quantizers.items():
        who, group = f"{site}: {quantizer.spec.describe()}", quantizer.tokens_per_scale
        block_tokens = policy.window(site.tensor).block_tokens
        if group is None:
            raise MismatchError(
                f"{who} shares scales among all tokens, later ones included; a cache needs scales that are known when "
                "a token is encoded. Use scales per token, per group of tokens (group_size) or calibrated ones, or the "
                "protocol 'full'."
            )
        if block_tokens % group:
            raise MismatchError(
                f"{who} shares scales among {group} tokens; expected a policy with block_tokens a multiple of {group}, "
                f"got {block_tokens}, so that tokens would be encoded in the middle of a group. Use "
                f"block_tokens={group} or a multiple of it."
            )
        # A predicted site decodes its sources from codes; with another window, or after eviction, some of those tokens
        # would be in full precision or gone, and the prediction another than the one that was encoded against.
        if quantizer.sources and not _alike_everywhere(policy):
            raise MismatchError(
                f"{who} is predicted from {', '.join(map(str, quantizer.sources))}, whose tokens must be encoded at "
                f"the same step as its own; got a policy with {policy.describe()}. Use one window for keys and "
                "values, no eviction, and keep_smallest_norm=0."
            )


def default_policy(
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    entry: Mapping[str, Any] | None = None,
    sinks_alone: bool = False,
) -> CachePolicy:
    """Policy of an artifact or of a recipe, for callers that give none.

    Parameters
    ----------
    quantizers : Artifact or mapping from Site to Quantizer
        An artifact brings its number of sink tokens. Without a cache entry there is no residual window: tokens are
        encoded at once, in blocks of the fewest whole groups.
    entry : mapping or None
        The `cache` entry of a recipe; None takes that of the artifact's recipe.
    sinks_alone : bool
        Ignore recipes, and keep nothing but sink tokens in full precision, as the protocol 'full' does.

    Raises
    ------
    ValueError
        If the entry has an unknown field, or one out of range.
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
    """True if every site encodes the same tokens at the same step."""
    return policy.values is None and policy.eviction is None and not policy.keep_smallest_norm


def group_tokens(quantizers: Mapping[Site, Quantizer]) -> int:
    """Least common multiple of the numbers of tokens that share a scale, over all quantizers."""
    # Blocks of this many tokens end where every quantizer's group ends, for keys and values alike.
    return math.lcm(*(quantizer.tokens_per_scale or 1 for quantizer in quantizers.values()))
