"""What a result says about how it came about: bits, and the protocol in phrases."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.policy import TENSORS, CachePolicy
from simquant.protocols import Protocol
from simquant.scored_targets import ScoredTargets
from simquant.usage import CONTEXT_TOKENS, Usage


def stored_bits(usage: Usage, policy: CachePolicy) -> dict[str, Any]:
    """Bits per element as counted, and with static bytes and exact tokens at some context lengths."""
    amortised = {
        str(n): {tensor: usage.amortised_bits(tensor, n, policy.exact_tokens(tensor, n)) for tensor in TENSORS}
        for n in CONTEXT_TOKENS
    }
    return {
        **{tensor: usage.bits(tensor) for tensor in TENSORS},
        "average": usage.average_bits,
        "static_bytes": {tensor: usage.static_bytes(tensor) for tensor in TENSORS},
        "amortised": amortised,
    }


def protocol_line(
    quantizers: Mapping[Site, Quantizer],
    protocol: Protocol,
    windows: Int64[Tensor, "windows tokens"],
    scored: ScoredTargets,
    normalization: str,
) -> str:
    """What was quantized, when, and how perplexity is normalised."""
    stages = sorted({site.stage.replace("_rope", "-RoPE") for site in quantizers if site.stage})
    causal = protocol.name != "full" or all(quantizer.tokens_per_scale == 1 for quantizer in quantizers.values())
    return "; ".join(
        [
            protocol.describe(),
            f"keys {', '.join(stages)}",
            protocol.policy.describe(),
            f"{len(windows)} windows of {windows.shape[1]} tokens, {scored.describe()}",
            "perplexity = exp(mean over targets)"
            if normalization == "targets"
            else "perplexity as GPTQ: exp(mean of the windows' means)",
            *([] if causal else ["NOT CAUSAL: scales look at later tokens"]),
        ]
    )
