"""Small packed caches: filled, stepped through, and generated on."""

from typing import Any

import torch
from torch import Tensor, nn

from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from simquant import CachePolicy
from simquant.cache.store.token_store import TokenStore

IDS = torch.arange(3, 27).reshape(2, 12)


def store_of(quantizer: Quantizer, policy: CachePolicy, block_tokens: int = 8) -> TokenStore:
    return TokenStore(quantizer, policy, policy.window("key"), block_tokens)


def filled(store: TokenStore, x: Tensor, sizes: list[int]) -> TokenStore:
    for part in x.split(sizes):
        store.append(part)
    return store


@torch.no_grad()
def step(model: nn.Module, cache: object, ids: Tensor, **options: Tensor) -> Tensor:
    return model(ids, **cache_argument(model, cache), use_cache=True, **options).logits


def generate(model: nn.Module, ids: Tensor, cache: object = None, **options: Any) -> Tensor:
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, **cache_argument(model, cache), **greedy)
