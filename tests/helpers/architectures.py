"""One small random model of each architecture whose sites are found."""

from functools import cache

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from artifacts.model.attention import AttentionLayer, attention_layers

BASE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


SUPPORTED: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "stablelm": {"qk_layernorm": True, "partial_rotary_factor": 0.5},
    "cohere": {},
    "glm": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "smollm3": {"no_rope_layer_interval": 2},
}


def build(kind: str, options: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**BASE, **options})
    return AutoModelForCausalLM.from_config(config).eval()


@cache
def supported(kind: str) -> tuple[PreTrainedModel, tuple[AttentionLayer, ...]]:
    model = build(kind, SUPPORTED[kind])
    return model, attention_layers(model)
