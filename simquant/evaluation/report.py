"""Description of an evaluation for its result: stored bits, and the protocol in phrases."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.evaluation.scored_targets import ScoredTargets
from simquant.policy.policy import TENSORS, CachePolicy
from simquant.protocols.chunking import Chunking
from simquant.protocols.protocol import Protocol
from simquant.usage import CONTEXT_TOKENS, Usage


def stored_bits(usage: Usage, policy: CachePolicy) -> dict[str, Any]:
    """Bits per element as counted, and with static bytes and full-precision tokens at some context lengths."""
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


def cache_phrases(quantizers: Mapping[Site, Quantizer], policy: CachePolicy) -> list[str]:
    """Phrases for reports: stage of the keys, and tokens in full precision."""
    stages = sorted({site.stage.replace("_rope", "-RoPE") for site in quantizers if site.stage})
    return [f"keys {', '.join(stages)}", policy.describe()]


def protocol_line(
    quantizers: Mapping[Site, Quantizer],
    protocol: Protocol,
    windows: Int64[Tensor, "windows tokens"],
    scored: ScoredTargets,
    normalization: str,
) -> str:
    """Line for reports: protocol, policy, windows, normalisation of perplexity, and causality."""
    evicts = protocol.policy.eviction is not None
    return "; ".join(
        [
            protocol.describe(),
            *cache_phrases(quantizers, protocol.policy),
            f"{len(windows)} windows of {windows.shape[1]} tokens, {scored.describe()}",
            "perplexity = exp(mean over targets)"
            if normalization == "targets"
            else "perplexity as GPTQ: exp(mean of the windows' means)",
            *(["bits by context length count evicted tokens, too"] if evicts else []),
            *([] if _is_causal(quantizers, protocol) else ["NOT CAUSAL: scales look at later tokens"]),
        ]
    )


def _is_causal(quantizers: Mapping[Site, Quantizer], protocol: Protocol) -> bool:
    """True if no query reads a token with a scale that depends on a token later than its own."""
    # Non-causal quantizers encode a group of tokens with one scale. With one token per step, or with a prefill in
    # full precision and one token per later step, a group is complete before any of its codes is read.
    if all(quantizer.is_causal for quantizer in quantizers.values()):
        return True
    chunking = protocol.chunking
    return protocol.name != "full" and (
        chunking == Chunking() or (chunking.chunk_tokens == 1 and protocol.policy.exact_prefill)
    )


def worse_than_guessing(perplexity: float, vocab_size: int) -> tuple[str, ...]:
    """Warning if the model in full precision is worse than a uniform guess over the vocabulary."""
    if not perplexity > vocab_size * 1.001:  # an untrained model guesses uniformly, up to rounding
        return ()
    return (
        f"perplexity in full precision is {perplexity:.6g}, where guessing evenly among {vocab_size} tokens has "
        f"{vocab_size}: something is wrong before anything is quantized. Look at the text, at the tokenizer (is it the "
        "model's own?) and at the weights (are they whole, trained, and of this config.json?)",
    )
