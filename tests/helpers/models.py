"""Random models that build in milliseconds, and runs of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from artifacts.sites import Stage

ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
}


STAGES: tuple[Stage, ...] = ("pre_rope", "post_rope")


IDS = torch.arange(1, 25).reshape(2, 12)


every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)


both_stages = pytest.mark.parametrize("stage", STAGES)


def build(kind: str, **options: object) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = {**sizes, **tokens, "num_hidden_layers": 2, "initializer_range": 0.2, **ARCHITECTURES[kind], **options}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config)).eval()


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    return model(ids, **({} if mask is None else padding(mask)), use_cache=False).logits


def padding(mask: Tensor) -> dict[str, Tensor]:
    return {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}


def left_padded(*lengths: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids and mask of a batch that is padded on the left, and each sequence alone."""
    width = max(lengths)
    alone = [torch.arange(3 + 7 * row, 3 + 7 * row + length)[None] for row, length in enumerate(lengths)]
    ids = torch.cat([nn.functional.pad(one, (width - one.shape[1], 0)) for one in alone])
    return ids, ids > 0, alone


def random_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of 2 layers, 4 query heads on 2 KV heads of head_dim 8, vocab 64, context 128; always the same one."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # ten times the usual: attention is far from uniform, so damage to a key shows
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def diff_llama() -> PreTrainedModel:
    """Attends twice, each time to half of the values."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return DiffLlamaForCausalLM(DiffLlamaConfig(**sizes, **heads)).eval()
