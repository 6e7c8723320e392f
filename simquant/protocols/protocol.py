"""The three ways to run a model on a quantized cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from artifacts.artifact import Artifact
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
    """How quantized logits of a text come about.

    Parameters
    ----------
    name : {'full', 'decode', 'cache'}
        Every token quantized before it is read; one pass in which each query sees what a cache holds at its step; or
        step by step through a packed cache. The last two agree up to rounding.
    policy : CachePolicy
        Which tokens stay exact.
    chunking : Chunking
        How the text enters the cache; 'full' has no steps.
    """

    name: ProtocolName
    policy: CachePolicy
    chunking: Chunking = field(default_factory=Chunking)

    def __post_init__(self) -> None:
        if self.name not in get_args(ProtocolName):
            raise ValueError(f"protocol: expected one of {', '.join(get_args(ProtocolName))}; got {self.name!r}")
        if self.name == "full" and not (self.policy.encodes_at_once and self.chunking == Chunking()):
            raise ValueError(
                f"protocol: 'full' quantizes every token but the sinks in one pass; got {self.policy.describe()}, "
                f"{self.chunking.describe()}. Use the protocol 'decode', or drop windows and steps."
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
        """The logits and what was stored; `logits` runs the model on whole texts."""
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
        """Whether any scored target of a text of `n_tokens`, from 2, is predicted from keys or values that have codes.

        Parameters
        ----------
        tensor, n_tokens
            Keys or values, of that many tokens.
        n_scored : int or None
            How many of the last targets are scored; None is all.
        sliding_window : int or None
            How many tokens back a query of the layer sees, its own among them; None is all.
        """
        ends = encoded_ends(self.policy.window(tensor), self.policy, self.chunking, n_tokens)
        tokens = torch.arange(n_tokens)
        seen_from = tokens - (sliding_window or n_tokens) + 1
        reads = torch.minimum(ends, tokens + 1) > seen_from.clamp_min(self.policy.sink_tokens)
        return bool(reads[:-1][-(n_scored or n_tokens) :].any())

    def describe(self) -> str:
        """What a query reads, for reports; which tokens stay exact is the policy's to say."""
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
        """The logits of the model as it is, in as many pieces as the quantized ones come about in.

        Where logits depend on how a text is cut (RoPE that changes with the length, activations quantized by their
        range), one pass would be another model.
        """
        return self._stepwise(model, batch, DynamicCache()) if self.name == "cache" else logits(model, batch)

    def _stepwise(self, model: nn.Module, batch: Tensor, cache: Cache) -> Tensor:
        batch = batch.to(next(model.parameters()).device)
        logits = torch.empty(0)
        for start, end in self.chunking.spans(batch.shape[1]):
            part = model(input_ids=batch[:, start:end], use_cache=True, **cache_argument(model, cache)).logits
            if not start:
                logits = part.new_empty(*batch.shape, part.shape[-1])
            logits[:, start:end] = part  # joined at the end, all of them would be there twice
        return logits

    def _run_packed(
        self,
        model: nn.Module,
        batch: Tensor,
        quantizers: Artifact | Mapping[Site, Quantizer],
        layers: Sequence[AttentionLayer],
    ) -> tuple[Tensor, Usage]:
        usage = Usage(quantizers)
        with packed_cache(model, quantizers, policy=self.policy, layers=layers) as new_cache:
            cache = new_cache()
            logits = self._stepwise(model, batch, cache)
        for layer in cache.layers:
            for site, store in layer.store.stores():
                usage.add_store(site, store)
        return logits, usage
