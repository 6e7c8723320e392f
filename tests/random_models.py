"""Random models that build in milliseconds."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


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
