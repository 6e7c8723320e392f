"""Memory and time per step of a packed cache against the dynamic and the quantized one of transformers.

One layer in the attention shapes of Llama-3-8B, 2 bits as KIVI sets them: keys per channel in groups of 32 tokens,
values per token in groups of 32 channels, a residual window of 128 tokens. Then, as costs without targets, two layers
with 2 bits in a basis of each head (recipe `eigen`), and in one of all heads with prediction (`predictive`), which
holds two layers' decoded tokens while a step runs. Their context is 2048 tokens at most. These quantizers are made up
instead of fitted: time and bytes depend on shapes and on numbers of levels, not on values.

Run on an idle machine, from the checkout: ``python -m scripts.bench.cache``; about a minute on two cores. The quantized
cache needs ``pip install '.[bench]'`` and a C++ compiler, and a minute more the first time.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import chain

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.mixed_codebook import MixedCodebook, mean_bits
from artifacts.quantizers.predicted import Predicted
from artifacts.quantizers.rotated import Rotated
from artifacts.sites import Site
from kvgauge.terminal.console import say
from scripts.bench.ratio import Measured, add_json_option, report, seconds
from simquant import CachePolicy, cache_argument, packed_cache

LEVELS = (24, 12, 8, 5, 3, 2, 1, 1)
"""Numbers of levels of each eighth of a basis' components, largest components first: 2 bits on average."""

_WEIGHT = 0.01
"""Standard deviation of a predictor's entries, so small that thousands of terms add up to no more than a value."""

KV_HEADS, HEAD_DIM, GROUP, RESIDUAL, BITS = 8, 128, 32, 128, 2

POLICY = CachePolicy(residual_tokens=RESIDUAL, block_tokens=GROUP)

LAYERS, MOST_TOKENS = 2, 2048
"""Layers and context of recipes in a basis: a step decodes all tokens by products of a head's or a layer's width."""


def eigen(layers: int, heads: int, head_dim: int) -> dict[Site, Quantizer]:
    """Quantizers with a basis for each head, as in the recipe `eigen`."""
    generator = torch.Generator().manual_seed(0)
    return {site: _rotated(heads, head_dim, generator) for site in _sites(layers)}


def predictive(layers: int, heads: int, head_dim: int) -> dict[Site, Quantizer]:
    """Quantizers of prediction residuals with one basis for all heads, as in the recipe `predictive`.

    Sources are keys and values of the layer before and, of values, the layer's own keys; the first keys have none.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[Site, Quantizer] = {}
    for site in _sites(layers):
        sources = [other for other in found if other.layer >= site.layer - 1]
        inner = _rotated(1, heads * head_dim, generator)
        found[site] = _predicted(site, sources, inner, generator) if sources else inner
    return found


def _sites(layers: int) -> Iterator[Site]:
    for layer in range(layers):
        yield Site(layer, "key", "pre_rope")
        yield Site(layer, "value")


def _predicted(site: Site, sources: list[Site], inner: Quantizer, generator: torch.Generator) -> Predicted:
    channels = inner.channels
    weight = _WEIGHT * torch.randn(len(sources) * channels, channels, generator=generator)
    return Predicted(
        channels=channels,
        site=site,
        inner=inner,
        source_sites=" ".join(map(str, sources)),
        weight=weight.half(),
        bias=torch.zeros(channels),
    )


def _rotated(groups: int, width: int, generator: torch.Generator) -> Rotated:
    basis = torch.linalg.qr(torch.randn(groups, width, width, generator=generator)).Q
    return Rotated(channels=groups * width, inner=_codebook(groups, width), basis=basis)


def _codebook(groups: int, width: int) -> MixedCodebook:
    """Codebook of evenly spaced levels around zero."""
    n_levels = torch.tensor(LEVELS, dtype=torch.int16).repeat_interleave(width // len(LEVELS)).repeat(groups)
    tables = [(torch.arange(n) - (n - 1) / 2) * 4 / n for n in n_levels.tolist()]
    channels = groups * width
    return MixedCodebook(
        channels=channels,
        bits=mean_bits(n_levels),
        scale=torch.ones(channels),
        offset=torch.zeros(channels),
        n_levels=n_levels,
        levels=torch.cat(tables).half(),
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("python -m scripts.bench.cache", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of context (default: 8192)")
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed (default: 10)")
    add_json_option(parser)
    args = parser.parse_args(argv)
    in_a_basis = rows_in_a_basis(min(args.tokens, MOST_TOKENS), args.repeats)
    what = ("one or two layers in the attention shapes of Llama-3-8B", "random keys and values")
    report(chain(rows(args.tokens, args.repeats), in_a_basis), args.json, "cache", argv, what)
    return 0


@torch.no_grad()
def rows(tokens: int, repeats: int) -> list[Measured]:
    """Memory against 16 bits an element, and seconds per step against the caches of transformers, all in float32."""
    model = model_of(layers=1)
    # The cache is filled directly: a forward pass over the context would take far longer than the timed steps.
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, generator=generator)
    baselines = {name: filled_step(model, cache, key, value, repeats) for name, cache in other_caches(model).items()}
    with packed_cache(model, quantizers(), policy=POLICY) as new_cache:
        packed = new_cache()
        packed.packed[0].store.append(key, value, None)
        size = packed.nbytes
        ours = seconds(lambda: step(model, packed), repeats)
    what = f"{tokens} tokens, {BITS} bits"
    found = [
        Measured(f"{what}: memory / 16 bits", size, 2 * key.numel() * 2, at_most=1 / 4.5, unit="B"),
        Measured(f"{what}: step / dynamic cache", ours, baselines["dynamic"], at_most=1.5),
    ]
    if "quantized" not in baselines:
        say("no quantized cache of transformers: pip install '.[bench]'")
        return found
    return [*found, Measured(f"{what}: step / quantized cache (quanto)", ours, baselines["quantized"], at_least=5)]


@torch.no_grad()
def rows_in_a_basis(tokens: int, repeats: int) -> Iterator[Measured]:
    """Memory and time per step of two layers after a prompt, which also brings the rotary tables for pre-RoPE keys."""
    model = model_of(LAYERS)
    prompt = torch.arange(tokens)[None] % model.config.vocab_size
    exact, plain = 2 * 2 * LAYERS * tokens * KV_HEADS * HEAD_DIM, DynamicCache()
    model(prompt, **cache_argument(model, plain))
    baseline = seconds(lambda: step(model, plain), repeats)
    for make in (eigen, predictive):
        own, what = make(LAYERS, KV_HEADS, HEAD_DIM), f"{tokens} tokens, {LAYERS} layers, {make.__name__}"
        with packed_cache(model, own) as new_cache:
            packed = new_cache()
            model(prompt, **cache_argument(model, packed))
            size = sum(tensor.nbytes for layer in packed.packed for tensor in layer.store.tensors())
            ours = seconds(partial(step, model, packed), repeats)
        yield Measured(f"{what}: memory / 16 bits", size, exact, unit="B")
        static = sum(quantizer.static_bytes for quantizer in own.values())
        yield Measured(f"{what}: static bytes / 16 bits", static, exact, unit="B")
        yield Measured(f"{what}: step / dynamic cache", ours, baseline)


def other_caches(model: LlamaForCausalLM) -> dict[str, Cache]:
    """Caches of transformers; the quantized one, with KIVI's settings, if its backend is installed."""
    # Asking for a submodule of a missing package raises, so that the package is looked up first.
    if find_spec("optimum.quanto" if find_spec("optimum") else "optimum") is None:
        return {"dynamic": DynamicCache()}
    quantized = QuantizedCache(
        "quanto",
        model.config,
        nbits=BITS,
        axis_key=-1,
        axis_value=0,
        q_group_size=GROUP,
        residual_length=RESIDUAL,
    )
    return {"dynamic": DynamicCache(), "quantized": quantized}


def filled_step(model: LlamaForCausalLM, cache: Cache, key: Tensor, value: Tensor, repeats: int) -> float:
    """Seconds of a decode step after the tokens `key` and `value`."""
    cache.update(key, value, 0)
    return seconds(lambda: step(model, cache), repeats)


def step(model: LlamaForCausalLM, cache: object) -> Tensor:
    """Logits of one decode step."""
    logits: Tensor = model(torch.ones(1, 1, dtype=torch.int64), **cache_argument(model, cache)).logits
    return logits


def quantizers() -> dict[Site, Quantizer]:
    """Quantizers with KIVI's settings."""
    channels = KV_HEADS * HEAD_DIM
    return {
        Site(0, "key", "post_rope"): DynamicAffine(channels=channels, bits=BITS, per="channel", group_size=GROUP),
        Site(0, "value"): DynamicAffine(channels=channels, bits=BITS, per="token", group_size=GROUP),
    }


def model_of(layers: int) -> LlamaForCausalLM:
    """Model whose time is that of attention: wide heads, and little else to compute."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
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
