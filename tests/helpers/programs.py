"""Texts, models and tokenizers for programs that are called as a user types them."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the",
    "a",
    "on",
    "under",
    "and",
    "cat",
    "dog",
    "sun",
    "rain",
    "hill",
    "sat",
    "ran",
    "fell",
    "red",
    "blue",
    "old",
)


def prose(seed: int, n_words: int = 900) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n_words))


def save_model(folder: Path, **changes: object) -> None:
    """A random Llama that reads bytes, 2 layers, context 64."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    limits = {"vocab_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **limits, **changes})).save_pretrained(folder)


def save_tokenizer(folder: Path, **special: str) -> None:
    """One token for each byte."""
    vocabulary = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
