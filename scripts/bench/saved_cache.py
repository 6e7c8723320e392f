"""Size of a saved cache, and tokens per second both ways, beside `torch.save` of the bfloat16 cache of transformers.

One layer in the attention shapes of Llama-3-8B, in bfloat16. "Save" goes from keys and values to the file, encoding
included; "load" from the file to the end of a first step, which decodes everything. Run on an idle machine, from the
checkout: ``python -m scripts.bench.saved_cache``; about a quarter of a minute on two cores.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from calib.estimators import EntropyCodedEstimator
from calib.estimators.estimator import trial_statistics
from calib.statistics.site_shape import SiteShape
from kvgauge.running.machine import hardware
from scripts.bench.cache import HEAD_DIM, KV_HEADS, model_of, quantizers, step
from scripts.bench.ratio import add_json_option, as_typed, seconds
from scripts.results.record import now, record
from scripts.results.schema import Figures
from simquant import load_cache, packed_cache, save_cache

CHANNELS = KV_HEADS * HEAD_DIM
KEY, VALUE = Site(0, "key", "post_rope"), Site(0, "value")
HEADER = f"{'cache':<34} {'bytes':>12} {'share':>7} {'save':>12} {'load':>12}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("python -m scripts.bench.saved_cache", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of context (default: 4096)")
    parser.add_argument("--repeats", type=int, default=3, help="times that everything is timed (default: 3)")
    add_json_option(parser)
    args = parser.parse_args(argv)
    print(hardware(), HEADER, sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        found = figures(args.tokens, args.repeats, Path(folder))
    for name, own in found.items():
        print(line(name, own), flush=True)
    if args.json is not None:
        conditions = now("one layer in the attention shapes of Llama-3-8B, bfloat16", f"{args.tokens} random tokens")
        command = as_typed("saved_cache", argv)
        record(args.json, "saved_cache", "Saved caches", [command], conditions, found)
    return 0


@torch.no_grad()
def figures(tokens: int, repeats: int, folder: Path) -> dict[str, Figures]:
    """Figures of each kind of cache, that of transformers first."""
    model = model_of(layers=1).bfloat16()
    x = activations(tokens)
    key, value = x.view(2, 1, tokens, KV_HEADS, HEAD_DIM).transpose(2, 3).bfloat16()
    found = {"bfloat16, torch.save": plain(model, key, value, folder / "plain.pt", repeats)}
    for name, own in {"KIVI, 2 bits": quantizers(), "entropy coded, 1 bit": entropy_coded(x)}.items():
        found[name] = packed(model, own, (key, value), folder / "packed.safetensors", repeats)
    baseline = found["bfloat16, torch.save"][0]
    return {
        name: {
            "bytes": size,
            "share": size / baseline,
            "save_tokens_per_second": tokens / save,
            "load_tokens_per_second": tokens / load,
        }
        for name, (size, save, load) in found.items()
    }


def line(name: str, own: Figures) -> str:
    """Below `HEADER`."""
    speeds = (f"{own[key]:>8.0f} t/s" for key in ("save_tokens_per_second", "load_tokens_per_second"))
    return " ".join([f"{name:<34} {own['bytes']:>12} {own['share']:>7.3f}", *speeds])


def plain(model: LlamaForCausalLM, key: Tensor, value: Tensor, path: Path, repeats: int) -> tuple[int, float, float]:
    """Bytes, and seconds of saving and loading, of a cache of transformers."""

    def save() -> None:
        cache = DynamicCache()
        cache.update(key, value, 0)
        torch.save(cache, path)

    def load() -> None:
        step(model, torch.load(path, weights_only=False))

    taken = seconds(save, repeats), seconds(load, repeats)
    return path.stat().st_size, *taken


def packed(
    model: LlamaForCausalLM,
    own: Mapping[Site, Quantizer],
    key_value: tuple[Tensor, Tensor],
    path: Path,
    repeats: int,
) -> tuple[int, float, float]:
    """Bytes, and seconds of saving and loading, of a packed cache."""
    with packed_cache(model, own) as new_cache:
        # Saving includes encoding; loading includes the step that decodes every token, as attention reads them all.

        def save() -> None:
            cache = new_cache()
            cache.packed[0].store.append(*key_value, None)
            save_cache(cache, path)

        def load() -> None:
            step(model, load_cache(path, new_cache()))

        taken = seconds(save, repeats), seconds(load, repeats)
    return path.stat().st_size, *taken


def activations(tokens: int) -> Tensor:
    """Keys and values "2 tokens channels" whose channels differ as those of a rotated layer do."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, CHANNELS, generator=generator) * torch.logspace(0.5, -1.5, CHANNELS)


def entropy_coded(x: Tensor) -> dict[Site, Quantizer]:
    """Quantizers fitted to the same tokens, without a rotation, which would take as long at any rate."""
    found = {}
    for site, rows in zip((KEY, VALUE), x, strict=True):
        statistics = trial_statistics(SiteShape(site=site, heads=KV_HEADS, head_dim=HEAD_DIM)).mapped(rows)
        found[site] = EntropyCodedEstimator(bits=1.0).fit(statistics).quantizer
    return found


if __name__ == "__main__":
    raise SystemExit(main())
