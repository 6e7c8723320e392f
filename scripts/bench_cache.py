"""Memory and time per step of a packed cache against the dynamic one of transformers.

One layer in the attention shapes of Llama-3-8B, 2 bits as KIVI sets them: keys per channel in groups of 32 tokens,
values per token in groups of 32 channels, the last 128 tokens exact. Run on an idle machine, from the checkout:
``python -m scripts.bench_cache``; about half a minute on two cores.
"""

import argparse

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from artifacts.dynamic_affine import DynamicAffine
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from scripts.benchmark import HEADER, hardware, row, seconds
from simquant import CachePolicy, packed_cache

KV_HEADS, HEAD_DIM, GROUP = 8, 128, 32
POLICY = CachePolicy(residual_tokens=128, block_tokens=GROUP)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("python -m scripts.bench_cache", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of context (default: 8192)")
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed (default: 10)")
    args = parser.parse_args(argv)
    print(hardware(), HEADER, sep="\n")
    for line in rows(args.tokens, args.repeats):
        print(line, flush=True)
    return 0


@torch.no_grad()
def rows(tokens: int, repeats: int) -> list[str]:
    """Memory against 16 bits an element, and seconds per step against a dynamic cache, both in float32."""
    model = one_layer()
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, generator=generator)
    dynamic = DynamicCache()
    dynamic.update(key, value, 0)
    baseline = seconds(lambda: step(model, dynamic), repeats)
    with packed_cache(model, quantizers(), policy=POLICY) as new_cache:
        packed = new_cache()
        packed.layers[0].store.append(key, value, None)
        size = packed.nbytes
        ours = seconds(lambda: step(model, packed), repeats)
    what = f"{tokens} tokens, 2 bits"
    return [
        row(f"{what}: memory / 16 bits", size, 2 * key.numel() * 2, at_most=1 / 4.5, unit="bytes"),
        row(f"{what}: step / dynamic cache", ours, baseline, at_most=1.5),
    ]


def step(model: LlamaForCausalLM, cache: object) -> Tensor:
    """One token more."""
    logits: Tensor = model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache).logits
    return logits


def quantizers() -> dict[Site, Quantizer]:
    """Those of KIVI at 2 bits."""
    channels = KV_HEADS * HEAD_DIM
    return {
        Site(0, "key", "post_rope"): DynamicAffine(channels=channels, bits=2, per="channel", group_size=GROUP),
        Site(0, "value"): DynamicAffine(channels=channels, bits=2, per="token", group_size=GROUP),
    }


def one_layer() -> LlamaForCausalLM:
    """A layer whose time is that of its attention: wide heads, and nothing else to compute."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2**17,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


if __name__ == "__main__":
    raise SystemExit(main())
