"""Tiny random models of any family: its own default configuration, with small numbers in place of large ones."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

WIDTH, HEADS, HEAD_DIM, VOCABULARY, POSITIONS, LAYERS = 64, 4, 16, 128, 128, 2
_NOISE = 0.1

_SIZES = (
    (
        WIDTH,
        """hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size
        dim_ff output_embedding_size intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_inner
        dff d_ff feed_forward_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        mlp_dim shared_experts_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size
        lru_width moe_shared_expert_intermediate_size router_hidden_size hidden_size_global input_size
        backbone_hidden_size out_hidden_size ple_embed_dim dim_model_base vision_output_dim adapter_in_dim
        adapter_out_dim""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads attention_heads
        num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads index_n_heads linear_num_heads
        linear_num_key_heads linear_num_value_heads num_key_value_heads swa_num_key_value_heads num_kv_heads
        num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num""",
    ),
    (
        HEAD_DIM,
        """head_dim swa_head_dim global_head_dim d_head dim_head d_kv kv_channels attention_head_size index_head_dim
        linear_head_dim linear_key_head_dim linear_value_head_dim v_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank
        mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank altup_rank laurel_rank hc_lowrank
        adapter_rank o_lora_rank hidden_size_per_layer_input""",
    ),
    (
        HEAD_DIM // 2,
        """qk_rope_head_dim rotary_dim sliding_window sliding_window_size attention_window_size local_attention
        window_size attention_chunk_size""",
    ),
    (
        VOCABULARY,
        """vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size""",
    ),
    (
        POSITIONS,
        """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions
        context_length index_topk original_max_position_embeddings""",
    ),
    (
        LAYERS,
        """moe_topk moe_k num_experts_per_tok num_experts_per_token num_kv_shared_layers mamba_n_groups n_groups""",
    ),
    (1, "n_group topk_group num_expert_group first_k_dense_replace pad_token_id bos_token_id eos_token_id"),
)
_SMALL = {name: size for size, names in _SIZES for name in names.split()}
_KV_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads")
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
)
_TURNS = ["linear_attention", "full_attention"]
_SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DoryConfig": {"n_input_layers": 1, "n_output_layers": 1},
    "Dots1Config": {"n_routed_experts": HEADS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense", "dense"]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "GraniteMoeHybridConfig": {"layer_types": _TURNS},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"head_dim": HEAD_DIM // 2},
    "MoshiConfig": {"sliding_window": POSITIONS},  # beyond it, its own cache forgets tokens that its mask shows
    "Mamba2Config": {"num_heads": 8, "head_dim": HEAD_DIM},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "ReformerConfig": {"axial_pos_embds": False},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "Zamba2Config": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""Fields of families whose sizes depend on one another, or whose defaults make no model."""


def tiny_model(family: str) -> PreTrainedModel:
    """A random model of a family, always the same one."""
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # gates and biases that start at zero would hide what is read
        for weight in model.parameters():
            weight.add_(_NOISE * torch.randn_like(weight))
    model.eval()
    return model


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default configuration of a class, with small sizes."""
    default: Any = kind()
    nested = {name: tiny_config(type(own)) for name, own in vars(default).items() if isinstance(own, PreTrainedConfig)}
    return kind(**{**dict(_small(kind, default)), **nested, **_SPECIAL.get(kind.__name__, {})})


def _small(kind: type[PreTrainedConfig], default: Any) -> Iterator[tuple[str, Any]]:
    """Fields that change: sizes, numbers and kinds of layers, and `head_dim` where the family always gives one."""
    before, after = _layers(default)
    for field in dataclasses.fields(kind):
        name = field.name
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if name == "is_decoder":
            yield name, True
        elif name in ("head_dim", "num_key_value_heads") and vars(default).get(name, 0) is None:
            yield name, _SMALL[name]
        elif name in _KV_HEADS and isinstance(value, int) and 1 < value < _heads(default):
            yield name, HEADS // 2  # grouped queries, as in the default
        elif isinstance(value, int) and not isinstance(value, bool) and name in _SMALL:
            yield name, min(value, _SMALL[name])
        elif isinstance(value, int) and name in _DEPTHS:
            yield name, min(value, after)
        elif isinstance(value, list | tuple) and len(value) == before:
            yield name, value[:after]


def _heads(default: Any) -> int:
    return next((vars(default)[name] for name in ("num_attention_heads", "n_head") if name in vars(default)), 0)


def _layers(default: Any) -> tuple[int, int]:
    """Number of layers by default, and of the shortest model with two layers that has one of each kind."""
    for name in ("layer_types", "layers_block_type"):
        kinds = list(getattr(default, name, None) or ())
        if kinds:
            return len(kinds), max(LAYERS, *(1 + kinds.index(kind) for kind in set(kinds)))
    return next((number for name in _DEPTHS if (number := getattr(default, name, None))), 0), LAYERS
