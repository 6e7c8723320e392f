"""A packed cache step by step, and the same in one decode-exact pass."""

from collections.abc import Sequence

import torch
from helpers.models import logits
from torch import Tensor, nn

from artifacts.codes import Codes
from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant import (
    CachePolicy,
    Chunking,
    decode_exact,
    packed_cache,
)

STEPS = {
    "decoding": Chunking(),
    "chunks": Chunking(prefill_tokens=4, chunk_tokens=4),
    "prefill": Chunking(prefill_tokens=21, chunk_tokens=1),
    "whole": Chunking(prefill_tokens=99),
}


IDS = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def through_the_cache(
    model: nn.Module,
    quantizers: dict[Site, Quantizer],
    policy: CachePolicy,
    chunking: Chunking,
    ids: Tensor = IDS,
    layers: Sequence[AttentionLayer] | None = None,
) -> tuple[Tensor, dict[tuple[Site, int], Codes | None]]:
    """Logits, and the codes of each site and sequence."""
    with packed_cache(model, quantizers, policy=policy, layers=layers) as new:
        cache = new()
        spans = chunking.spans(ids.shape[1])
        parts = [model(ids[:, start:end], **cache_argument(model, cache)).logits for start, end in spans]
    stores = [(store.key_site, stream.key, row) for store, row, stream in streams(cache)]
    stores += [(store.value_site, stream.value, row) for store, row, stream in streams(cache)]
    return torch.cat(parts, 1), {(site, row): tokens.codes() for site, tokens, row in stores}


def both_ways(
    model: nn.Module, quantizers: dict[Site, Quantizer], policy: CachePolicy, chunking: Chunking
) -> tuple[Tensor, Tensor]:
    """Logits step by step and of one pass; in float64, so that rounding hardly ever moves a value to another code."""
    layers = attention_layers(model)
    model.double()
    stepwise, _ = through_the_cache(model, quantizers, policy, chunking, IDS, layers)
    with decode_exact(model, quantizers, policy=policy, chunking=chunking, layers=layers):
        return stepwise, logits(model, IDS)


def streams(cache: object) -> list[tuple[object, int, object]]:
    return [(layer.store, row, stream) for layer in cache.layers for row, stream in enumerate(layer.store.sequences)]
