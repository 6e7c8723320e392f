"""Evaluation protocol: a way to run a model on a quantized cache, with its policy and chunking."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from artifacts.artifact import Artifact
from artifacts.errors import InvalidValueError
from artifacts.model.attention import AttentionLayer
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.cache.packed import packed_cache
from simquant.policy.policy import CachePolicy
from simquant.protocols.chunking import Chunking
from simquant.protocols.decode import decode_exact
from simquant.protocols.two_sided_attention import encoded_ends
from simquant.simulate import simulate
from simquant.usage import Usage

ProtocolName = Literal["full", "decode", "cache"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Way to compute the logits of a text with a quantized cache.

    Parameters
    ----------
    name : {'full', 'decode', 'cache'}
        'full': every token is quantized before any query reads it. 'decode': one pass in which each query reads what
        a packed cache holds at its step. 'cache': step by step through a packed cache. The last two agree up to
        rounding.
    policy : CachePolicy
        Tokens kept in full precision.
    chunking : Chunking
        Steps in which the text is read; 'full' reads it in one.
    """

    name: ProtocolName
    policy: CachePolicy
    chunking: Chunking = field(default_factory=Chunking)

    def __post_init__(self) -> None:
        if self.name not in get_args(ProtocolName):
            raise InvalidValueError(f"protocol: expected one of {', '.join(get_args(ProtocolName))}; got {self.name!r}")
        if self.name == "full" and not (self.policy.encodes_at_once and self.chunking == Chunking()):
            raise InvalidValueError(
                f"protocol: 'full' quantizes every token but the sinks in one pass; got {self.policy.describe()}, "
                f"{self.chunking.describe()}. Use the protocol 'decode', or drop the residual window and the chunking."
            )

    def run(
        self,
        model: nn.Module,
        batch: Int64[Tensor, "windows tokens"],
        quantizers: Artifact | Mapping[Site, Quantizer],
        layers: Sequence[AttentionLayer],
        *,
        logits: Callable[[nn.Module, Tensor], Tensor],
    ) -> tuple[Float[Tensor, "windows tokens vocab"], Usage]:
        """Logits under the protocol, with counts of the stored tokens; `logits` runs the model on whole texts."""
        if self.name == "cache":
            return self._run_packed(model, batch, quantizers, layers)
        context = (
            simulate(model, quantizers, policy=self.policy, layers=layers)
            if self.name == "full"
            else decode_exact(model, quantizers, policy=self.policy, chunking=self.chunking, layers=layers)
        )
        with context as usage:
            return logits(model, batch), usage

    def reads_codes(
        self,
        tensor: Literal["key", "value", "query"],
        n_tokens: int,
        *,
        n_scored: int | None = None,
        sliding_window: int | None = None,
    ) -> bool:
        """True if any scored target of a text is predicted from encoded keys or values.

        Parameters
        ----------
        tensor, n_tokens
            Keys or values of a text of that many tokens, from 2.
        n_scored : int or None
            Last targets that are scored; None is all.
        sliding_window : int or None
            Tokens that a query of the layer sees, its own included; None is all.
        """
        ends = encoded_ends(self.policy.window(tensor), self.policy, self.chunking, n_tokens)
        tokens = torch.arange(n_tokens)
        seen_from = tokens - (sliding_window or n_tokens) + 1
        # Query t sees tokens [seen_from, t]; those in [sinks, ends) are encoded. It reads codes if the ranges meet.
        # The last query predicts no target, so that it is left out before the scored ones are taken.
        reads = torch.minimum(ends, tokens + 1) > seen_from.clamp_min(self.policy.sink_tokens)
        return bool(reads[:-1][-(n_scored or n_tokens) :].any())

    def describe(self) -> str:
        """Phrase for reports; the policy describes the tokens in full precision."""
        if self.name == "full":
            return "fully quantized: every query, its own token included, reads decoded keys and values"
        way = (
            "packed cache, against a plain one in the same steps"
            if self.name == "cache"
            else "decode-exact: every query reads what a cache holds at its step"
        )
        return f"{way}; {self.chunking.describe()}, {self.policy.describe_prefill()}"

    def exact_logits(
        self, model: nn.Module, batch: Int64[Tensor, "windows tokens"], *, logits: Callable[[nn.Module, Tensor], Tensor]
    ) -> Float[Tensor, "windows tokens vocab"]:
        """Logits of the model in full precision, computed in the same steps as the quantized ones.

        Some models give other logits for another chunking (RoPE factors that depend on the length, activations
        quantized by their range): in one pass they would be another model.
        """
        return self._stepwise(model, batch, DynamicCache()) if self.name == "cache" else logits(model, batch)

    def _stepwise(self, model: nn.Module, batch: Tensor, cache: Cache) -> Tensor:
        batch = batch.to(next(model.parameters()).device)
        logits = torch.empty(0)
        for start, end in self.chunking.spans(batch.shape[1]):
            part = model(input_ids=batch[:, start:end], use_cache=True, **cache_argument(model, cache)).logits
            if not start:
                logits = part.new_empty(*batch.shape, part.shape[-1])
            logits[:, start:end] = part  # torch.cat at the end would hold all logits twice
        return logits

    def _run_packed(
        self,
        model: nn.Module,
        batch: Tensor,
        quantizers: Artifact | Mapping[Site, Quantizer],
        layers: Sequence[AttentionLayer],
    ) -> tuple[Tensor, Usage]:
        # Counts are taken from the stores after the last step: bytes that are really held, not a formula.
        usage = Usage(quantizers)
        with packed_cache(model, quantizers, policy=self.policy, layers=layers) as new_cache:
            cache = new_cache()
            logits = self._stepwise(model, batch, cache)
        for layer in cache.packed:
            for site, store in layer.store.stores():
                usage.add_store(site, store)
        return logits, usage
