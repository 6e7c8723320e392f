"""The demo model before it is trained: its tokenizer, its shape, its first weights."""

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calib.demo.pages import page

VOCAB, TOKENIZER_PAGES = 2432, 8000


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs merged on training pages; numbers are cut into two digits at a time."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((page("training", i) for i in range(TOKENIZER_PAGES)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=1024)


def new_model(seed: int) -> LlamaForCausalLM:
    """Random weights; the slowest RoPE pairs of every key head start with a large bias."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        _enlarge_slow_pairs(layer.self_attn.k_proj.bias, layer.self_attn.head_dim)
    return model


@torch.no_grad()
def _enlarge_slow_pairs(bias: Tensor, head_dim: int) -> None:
    """A bias on a pair that hardly turns shifts all scores of a query alike: attention is the same, the keys are not.

    It gives the keys what those of large models have, a few channels far from zero.
    """
    half = head_dim // 2
    for head in bias.view(-1, head_dim):
        for pair, size in ((half - 1, 8.0), (half - 2, 4.0)):
            angle = float(torch.rand(())) * 2 * math.pi
            head[pair], head[pair + half] = size * math.cos(angle), size * math.sin(angle)
