"""Time of decode attention over packed keys and values, against attention over bfloat16 ones, on a CUDA device.

Run on an idle GPU, from the checkout: ``python -m scripts.bench.kernels``. Keys are quantized per channel (static at 4
bits, in groups of 128 tokens at 2), values per token (at 2 bits in groups of 128 channels). The roofline is the least
time in which the device can read the stored bytes; its bandwidth is looked up by the device's name.

Written and checked without a GPU: the kernels agree with the torch path in Triton's interpreter, and they compile for
compute capability 9.0. No time, no bandwidth and no result on a device has been measured yet, and the settings of the
kernels (block of tokens, splits, stages) are not tuned. A loop of 128 tokens takes about 4 instructions a value at 4
bits; at that rate instructions, not memory, can be what limits 2 bits.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.dynamic_affine import DynamicAffine
from scripts.bench.ratio import Measured, add_json_option, report
from simquant.cache.attention.block_attention import BlockAttention, Scoring
from simquant.cache.store.layer_store import BLOCK_TOKENS
from simquant.kernels.attention import Block, attend_packed

PEAK_GBS = {"H200": 4800, "H100 PCIe": 2000, "H100 NVL": 3900, "H100": 3350, "A100": 2039, "L40S": 864, "4090": 1008}
"""Memory bandwidth in GB/s by a part of the device's name, the vendor's figures; the first that fits counts."""

_HEAD_DIM = 128
_FLUSH_BYTES = 2**28
"""More than any cache on the chip holds: written between two runs, so that each reads from memory."""


class Case(NamedTuple):
    """Two quantizers and how many times as fast as bfloat16 they should be."""

    name: str
    keys: Quantizer
    values: Quantizer
    at_least: float


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("python -m scripts.bench.kernels", description=__doc__)
    parser.add_argument("--tokens", type=int, default=131072, help="cached tokens (default: 131072)")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads of 128 channels (default: 8)")
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head (default: 4)")
    parser.add_argument("--peak-gbs", type=float, help="memory bandwidth in GB/s (default: by the device's name)")
    add_json_option(parser)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return refuse("a CUDA device is needed and none was found; run it where there is one, with kvgauge[triton]")
    peak = args.peak_gbs or known_peak(torch.cuda.get_device_name())
    if peak is None:
        return refuse(f"no bandwidth is known for {torch.cuda.get_device_name()}; give --peak-gbs")
    rows = compare(args.tokens, args.kv_heads, args.group, peak)
    what = ("one layer in the shapes of Llama-3-8B", f"{args.tokens} random tokens")
    report(rows, args.json, "kernels", argv, what)
    return 0


def refuse(why: str) -> int:
    """Says why nothing is measured; returns the exit status."""
    print(f"bench_kernels: {why}", file=sys.stderr)
    return 2


def known_peak(name: str) -> float | None:
    """Bandwidth of a device in GB/s.

    Examples
    --------
    >>> known_peak("NVIDIA H200"), known_peak("another")
    (4800, None)
    """
    return next((peak for part, peak in PEAK_GBS.items() if part in name), None)


@torch.no_grad()
def compare(tokens: int, kv_heads: int, group: int, peak_gbs: float) -> list[Measured]:
    """Rows of every case against attention over bfloat16, with the share of the roofline that each reaches."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    keys, values = torch.randn(2, 1, kv_heads, tokens, _HEAD_DIM, device=device, dtype=torch.bfloat16)
    q = torch.randn(1, kv_heads * group, _HEAD_DIM, device=device, dtype=torch.bfloat16)
    sdpa = device_seconds(lambda: scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True))
    lines = []
    for case in cases(kv_heads * _HEAD_DIM, device):
        blocks = pack_tokens(case, keys, values)
        ours = device_seconds(lambda case=case, blocks=blocks: attend(q[0], case, blocks))  # type: ignore[misc]
        n_bytes = sum(block.keys.nbytes + block.values.nbytes for block in blocks)
        bits = 8 * n_bytes / (2 * tokens * kv_heads * _HEAD_DIM)
        what = f"{case.name}, {bits:.2f} bits {roofline(n_bytes, ours, peak_gbs)}"
        lines.append(Measured(f"{what} / SDPA", ours, sdpa, at_least=case.at_least))
    return lines


def attend(q: Tensor, case: Case, blocks: list[Block]) -> Tensor:
    """Attention over the quantized tokens of a packed cache in a decode step."""
    scaling = _HEAD_DIM**-0.5
    attention = BlockAttention(q[:, None], case.keys.channels // _HEAD_DIM, Scoring(scaling=scaling))
    attention.add_splits(*attend_packed(q, (case.keys, case.values), blocks, scaling))
    return attention.result()


def cases(channels: int, device: torch.device) -> list[Case]:
    """Measured cases; values are normally distributed, so that static ranges are 4 standard deviations."""
    scale = torch.full((channels,), 8 / 15, device=device)
    static = Affine(channels=channels, bits=4, scale=scale, offset=torch.full_like(scale, -4.0))
    return [
        Case("4-bit", static, DynamicAffine(channels=channels, bits=4), 3),
        Case(
            "2-bit",
            DynamicAffine(channels=channels, bits=2, per="channel", group_size=128),
            DynamicAffine(channels=channels, bits=2, group_size=_HEAD_DIM),
            4.5,
        ),
    ]


def pack_tokens(case: Case, keys: Tensor, values: Tensor) -> list[Block]:
    """Keys and values in the blocks of a packed cache."""
    sides = [x[0].transpose(0, 1).flatten(1).split(BLOCK_TOKENS) for x in (keys, values)]
    return [
        Block(case.keys.encode(key), case.values.encode(value), len(key), None)
        for key, value in zip(*sides, strict=True)
    ]


def roofline(n_bytes: int, seconds: float, peak_gbs: float) -> str:
    """Achieved bandwidth and its share of the peak.

    Examples
    --------
    >>> roofline(4_800_000, 2e-6, 4800)
    '(2400 GB/s, 50 %)'
    """
    achieved = n_bytes / seconds / 1e9
    return f"({achieved:.0f} GB/s, {100 * achieved / peak_gbs:.0f} %)"


def device_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds on the device by its own clock, with a cold cache; launched as a graph, without Python between."""
    call()  # compiles
    # Replaying a captured graph leaves Python and launch overhead out of the time between the two events.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    # Overwriting more memory than the L2 cache holds makes each run read its operands from device memory.
    flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    taken: list[float] = []
    for _ in range(repeats):
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return sorted(taken)[repeats // 2]


if __name__ == "__main__":
    raise SystemExit(main())
