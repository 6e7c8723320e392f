"""Time of quantizing keys and values, and of a fully quantized evaluation against the full-precision forward pass.

Run on an idle machine, from the checkout: ``python -m scripts.bench.simulate``; about half a minute on two cores.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from artifacts.model.attention import attention_layers
from calib import calibrate, fit, load_recipe, shipped_recipes
from calib.recipe.recipe import Recipe
from scripts.bench.ratio import Measured, add_json_option, report, seconds
from scripts.bench.synthetic import model_statistics, site_values
from simquant import evaluate, perplexity, simulate
from simquant.evaluation.scoring import window_logits

BATCH = 8
"""Windows per forward pass."""

SITE_SECONDS = 0.15
"""Seconds that a shipped recipe may take for the vectors of a site."""

OUTLIERS = {"fraction": 0.01}
"""Fraction of the values stored as outliers."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("python -m scripts.bench.simulate", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a site (default: 2048)")
    parser.add_argument("--heads", type=int, default=8, help="KV heads of 128 channels (default: 8)")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens (default: 16)")
    parser.add_argument("--vocab", type=int, help="adds a small model with so many tokens, such as 262144")
    parser.add_argument("--model", help="adds a model of transformers, from this folder")
    add_json_option(parser)
    args = parser.parse_args(argv)
    what = ("one layer in the shapes of Llama-3-8B, and small models", "synthetic vectors, random tokens")
    report(compare(args), args.json, "simulate", argv, what)
    return 0


def compare(args: argparse.Namespace) -> Iterator[Measured]:
    """All rows."""
    yield from quantize_sites(args.tokens, args.heads)
    yield from simulate_recipes(args.tokens, args.heads)
    yield from evaluate_model(args.windows)
    yield from evaluate_wholly(args)


@torch.no_grad()
def quantize_sites(tokens: int, heads: int) -> list[Measured]:
    """Rows for keys and values of one layer: 3 bits, 1 % outliers, through codes and back."""
    statistics = model_statistics(tokens, heads, layers=1)
    quantizers = fit(statistics, recipe(outliers=OUTLIERS))
    vectors = {site: site_values(tokens, heads * 128, seed=n) for n, site in enumerate(quantizers)}

    def simulated() -> None:
        for site, x in vectors.items():
            quantizers[site].decode(quantizers[site].encode(x))

    def plain() -> None:
        for x in vectors.values():
            nearest_by_distance(x, n_levels=8)

    ours, baseline = (seconds(call, repeats=5) for call in (simulated, plain))
    what = f"keys and values of {tokens} x {heads * 128}, 3 bits, 1 % outliers"
    return [
        Measured(f"{what} / limit", ours, 0.1, at_most=1),
        Measured(f"{what} / all distances", ours, baseline),
    ]


@torch.no_grad()
def simulate_recipes(tokens: int, heads: int) -> Iterator[Measured]:
    """Rows for the shipped recipes: the slower of a key and a value site, through codes and back.

    Recipes that predict sites from others are left out: they are for stored caches, not for those read at each step.
    """
    x = site_values(tokens, heads * 128, seed=7)
    what = f"{tokens} x {heads * 128}"
    plain = seconds(lambda: nearest_by_distance(x, n_levels=8), repeats=3)
    yield Measured(f"{what}, all distances / limit", plain, SITE_SECONDS)
    for stage in ("pre_rope", "post_rope"):
        statistics = model_statistics(tokens, heads, layers=1, stage=stage)
        for recipe in (load_recipe(name) for name in shipped_recipes()):
            if recipe.stage == stage and not recipe.needs_full:
                slowest = max(seconds(partial(q.simulate, x), repeats=3) for q in fit(statistics, recipe).values())
                yield Measured(f"{what}, {recipe.name} / limit", slowest, SITE_SECONDS, at_most=1)


def nearest_by_distance(x: Float[Tensor, "tokens channels"], n_levels: int) -> Float[Tensor, "tokens channels"]:
    """Naive quantization: quantiles of each token, then the distance to every level."""
    # Values outside of the inner 99 % of their token are kept as outliers, the others move to the nearest level; the
    # distances to all levels make a tensor n_levels times as large as the input.
    low, high = (torch.quantile(x, q, dim=1, keepdim=True) for q in (0.005, 0.995))
    middle, half = (low + high) / 2, (high - low) / 2
    levels = torch.linspace(-1, 1, n_levels)
    nearest = (((x - middle) / half)[..., None] - levels).abs().argmin(dim=-1)
    return torch.where((x < low) | (x > high), x, levels[nearest] * half + middle)


def evaluate_model(n_windows: int) -> list[Measured]:
    """Rows for the perplexity of a small model with a quantized cache, against full precision."""
    model, windows = story_model(), story_windows(n_windows)
    recipes = {"3 bits": recipe(), "3 bits, 1 % outliers": recipe(outliers=OUTLIERS)}
    return [
        Measured(f"evaluation, {name} / exact", *evaluation_seconds(model, windows, chosen), at_most=1.3)
        for name, chosen in recipes.items()
    ]


def evaluate_wholly(args: argparse.Namespace) -> Iterator[Measured]:
    """Rows for whole evaluations of larger models, with KL, on one window, against two full-precision passes."""
    if args.vocab:
        yield wholly(f"vocabulary of {args.vocab}", vocabulary_model(args.vocab), args.tokens)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        yield wholly("model as given", model.eval(), min(args.tokens, model.config.max_position_embeddings))


@torch.no_grad()
def wholly(what: str, model: PreTrainedModel, tokens: int) -> Measured:
    """Row of one model."""
    vocab = model.config.vocab_size
    windows = torch.randint(vocab, (2, tokens), generator=torch.Generator().manual_seed(0))
    # An evaluation needs at least two passes, in full precision and quantized; the target bounds all that it adds.
    quantizers = calibrate(model, windows[:1], recipe())
    evaluated = seconds(partial(evaluate, model, windows[1:], quantizers), repeats=2)
    exact = seconds(partial(window_logits, model, windows[1:]), repeats=2)
    return Measured(f"{what}, {tokens} tokens: evaluation / 2 passes", evaluated, 2 * exact, at_most=1.2)


def evaluation_seconds(
    model: LlamaForCausalLM, windows: Int64[Tensor, "windows tokens"], chosen: Recipe
) -> tuple[float, float]:
    """Seconds of the quantized and of the full-precision evaluation."""
    quantizers = calibrate(model, windows[:4], chosen)
    layers = attention_layers(model)

    def exact() -> None:
        perplexity(model, windows, batch_size=BATCH)

    def quantized() -> None:
        with simulate(model, quantizers, layers=layers):
            perplexity(model, windows, batch_size=BATCH)

    return seconds(quantized, repeats=5), seconds(exact, repeats=5)


def recipe(**changes: Any) -> Recipe:
    """KVQuant's codebooks of 3 bits, with some changes for keys and values."""
    entry = {"method": "codebook", "bits": 3, "tables": "site", "weights": "none", **changes}
    return load_recipe("kvquant").edited({"key": entry, "value": entry})


def vocabulary_model(vocab: int) -> LlamaForCausalLM:
    """Random weights in the shape of a small public model whose vocabulary outweighs its layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=2**15,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def story_model() -> LlamaForCausalLM:
    """Random weights in the shape of a small public story model (260,000 parameters)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def story_windows(count: int) -> Int64[Tensor, "windows tokens"]:
    """Random tokens."""
    return torch.randint(512, (count, 512), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    raise SystemExit(main())
