"""Time and memory of gathering statistics, against the bare forward passes of the same windows.

Run on an idle machine, from the checkout: ``python -m scripts.bench.calibrate``; about ten minutes on two
cores, and 8 GiB. With ``--model PATH`` a real model takes the place of random weights, and every row is measured once
more beside a process that keeps a core busy.
"""

import argparse
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from artifacts.model.attention import attention_layers
from artifacts.model.evidence import text_config
from calib.calibration import add_windows, new_statistics
from calib.statistics.site_statistics import Tier
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.models import load_model
from scripts.bench.ratio import Measured, add_json_option, company_row, report, seconds

VOCAB = 1024
"""Vocabulary, small on purpose: a large output matrix would slow the bare forward passes down."""

LIMITS: dict[Tier, float] = {"basic": 1.15, "full": 1.35}
"""Limit of each tier, as a multiple of the bare forward passes."""

REAL_LIMITS: dict[Tier, float] = {"basic": 1.2, "full": 1.0}
"""Limits for a real model; `full` with Fisher is against forward and backward passes."""


@dataclass(frozen=True)
class Job:
    """Settings of one run.

    Parameters
    ----------
    heads : int
        KV heads, of 128 channels, each read by four query heads; Llama-3-8B has 8.
    tokens, windows : int
        Length and number of the windows.
    tier : {'basic', 'full'}
        Tier of the statistics.
    """

    heads: int
    tokens: int
    windows: int
    tier: Tier = "full"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("python -m scripts.bench.calibrate", description=__doc__)
    parser.add_argument("--heads", type=int, default=8, help="KV heads of 128 channels (default: 8)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a window (default: 2048)")
    parser.add_argument("--windows", type=int, default=4, help="windows; four times as many for memory (default: 4)")
    parser.add_argument("--model", help="a real model, and nothing else, on windows of random tokens")
    add_json_option(parser)
    args = parser.parse_args(argv)
    text = f"{args.windows} windows of {args.tokens} random tokens"
    if args.model:
        rows = compare_real(args.model, args.tokens, args.windows)
        report(rows, args.json, "calibrate", argv, (Path(args.model).name, text))
        return 0
    job = Job(args.heads, args.tokens, args.windows)
    report(compare_random(job), args.json, "calibrate", argv, ("two layers in the shapes of Llama-3-8B", text))
    return 0


def compare_random(job: Job) -> Iterator[Measured]:
    """Rows for a model of random weights: time, then memory."""
    yield from compare_times(job)
    yield compare_memory(job)


def compare_times(job: Job) -> list[Measured]:
    """Rows for both tiers against the bare forward passes, each the best of two runs."""
    model, windows = two_layers(job), random_windows(job)
    baseline = seconds(forward_passes(model, windows), repeats=2)
    rows = []
    for tier, limit in LIMITS.items():
        ours = seconds(gathering(model, windows, tier), repeats=2)
        rows.append(Measured(f"{len(windows)} windows, {tier} / bare", ours, baseline, at_most=limit))
    return rows


def compare_real(name: str, tokens: int, windows: int) -> Iterator[Measured]:
    """Rows for `basic` against forward passes, and `full` with Fisher against forward and backward passes."""
    model = load_model(ModelConfig(model=name, device="cpu", dtype="float32")).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text_config(model).vocab_size, (windows, tokens), generator=generator)
    works: list[tuple[str, Tier, bool, Callable[[], None]]] = [
        ("basic / forward", "basic", False, forward_passes(model, ids)),
        ("full, Fisher / forward and backward", "full", True, backward_passes(model, ids)),
    ]
    for what, tier, fisher, bare in works:
        gather = gathering(model, ids, tier, fisher=fisher)
        label = f"{name.rstrip('/').rsplit('/', 1)[-1]}, {windows} windows, {what}"
        ours, baseline = seconds(gather, repeats=2), seconds(bare, repeats=2)
        yield Measured(label, ours, baseline, at_most=REAL_LIMITS[tier])
        yield company_row(label, gather, ours)


def forward_passes(model: nn.Module, windows: Int64[Tensor, "windows tokens"]) -> Callable[[], None]:
    """Forward passes of the model alone."""

    @torch.no_grad()
    def run() -> None:
        for window in windows:
            model(input_ids=window[None], use_cache=False)

    return run


def backward_passes(model: nn.Module, windows: Int64[Tensor, "windows tokens"]) -> Callable[[], None]:
    """Forward and backward passes, with gradients of the weights, without which none reach a key."""

    def run() -> None:
        for window in windows:
            model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
            model.zero_grad()

    return run


def compare_memory(job: Job) -> Measured:
    """Row for the peak memory of a process that takes four times as many windows."""
    many = Job(job.heads, job.tokens, 4 * job.windows)
    # Peak memory is that of a process: each job runs in a new one. Fixed memory means a ratio of one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        ours, baseline = processes.map(peak_gibibytes, (many, job))
    return Measured(f"peak memory, {many.windows} / {job.windows} windows", ours, baseline, at_most=1.05, unit="GiB")


def peak_gibibytes(job: Job) -> float:
    """Peak memory of this process, after gathering statistics."""
    gathering(two_layers(job), random_windows(job), job.tier)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def gathering(
    model: nn.Module, windows: Int64[Tensor, "windows tokens"], tier: Tier, *, fisher: bool = False
) -> Callable[[], None]:
    """Part of `calibrate` between finding the layers and fitting."""
    layers = attention_layers(model)

    def gather() -> None:
        add_windows(model, layers, new_statistics(model, layers, tier=tier, fisher=fisher), windows)

    return gather


def two_layers(job: Job) -> LlamaForCausalLM:
    """Random weights in the shape of two layers of Llama-3-8B."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512 * job.heads,
        intermediate_size=1792 * job.heads,
        num_hidden_layers=2,
        num_attention_heads=4 * job.heads,
        num_key_value_heads=job.heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def random_windows(job: Job) -> Int64[Tensor, "windows tokens"]:
    """Random tokens."""
    return torch.randint(VOCAB, (job.windows, job.tokens), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    raise SystemExit(main())
