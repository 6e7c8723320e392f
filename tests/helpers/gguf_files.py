"""Tiny GGUF files, with the weights and the tokenizer of a folder that holds the same model."""

from pathlib import Path
from typing import Any

import numpy as np
from helpers.programs import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PIECES = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<|endoftext|>"]
"""One token for each byte, two that merges make, and the one that a tokenizer of GPT-2's kind has in any case."""

MERGES = [("t", "h"), ("th", "e")]

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Parts of a Llama, by transformers' names and llama.cpp's."""


def save_llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of 2 layers, context 64, in a folder with its tokenizer."""
    save_model(folder, vocab_size=len(PIECES), **changes)
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> None:
    """Writes a Llama as llama.cpp's converter does: matrices of a kind such as `Q8_0`, norms in float32.

    `keys` are more keys of the header, `tensors` more tensors.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(PIECES)
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
    for key, value in (keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, weight in model.state_dict().items():
        quantization = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        values = _as_in_llama_cpp(name, weight, config).numpy().astype(np.float32)
        writer.add_tensor(_name(name), gguf.quantize(values, quantization), raw_dtype=quantization)
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    part = name.removesuffix(".weight")
    if not part.startswith("model.layers."):
        return f"{_NAMES[part]}.weight"
    _, _, layer, rest = part.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _as_in_llama_cpp(name: str, weight: Tensor, config: Any) -> Tensor:
    # llama.cpp turns neighbouring channels by RoPE, transformers those half a head apart: its converter of Llama
    # reorders the rows of the projections, within each head from (2, head_dim / 2) to (head_dim / 2, 2).
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
