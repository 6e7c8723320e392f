"""Triton kernels against the torch path, on codes and through the packed cache: attention within rounding.

Triton decides when it is imported whether programs are interpreted. So the tests below run in a process of their own,
started by the one test that the suite sees; ``TRITON_INTERPRET=1 python -m pytest tests/simquant/kernels`` runs them
directly if KVGAUGE_KERNELS=1 is set too, and with 0 on a GPU.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.caches import generate, step
from helpers.models import build
from torch import Tensor

from artifacts.model.rope import rotate
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.sites import Site
from simquant import CachePolicy, ResidualWindow, packed_cache
from simquant.cache.attention.block_attention import BlockAttention, Scoring
from simquant.cache.store import packed_reading
from simquant.kernels import support
from simquant.kernels.attention import Block, attend_packed

pytestmark = pytest.mark.shapes

INSIDE = "TRITON_INTERPRET" in os.environ
DEVICE = torch.device("cuda" if os.environ.get("TRITON_INTERPRET") == "0" else "cpu")
ROOT = Path(__file__).parents[3]
inside = pytest.mark.skipif(not INSIDE or find_spec("triton") is None, reason="runs in a process of its own")

BITS = (1, 2, 3, 4, 8)
KV_HEADS, HEAD_DIM = 2, 64
KINDS = (
    "affine",
    "symmetric affine",
    "codebook",
    "codebook per channel",
    "per token",
    "per token, a head",
    "per token, quarter heads",
    "per token, symmetric",
    "per channel, 64 tokens",
    "per channel, 5 tokens",
)


def quantizer(kind: str, bits: int, head_dim: int = HEAD_DIM) -> Quantizer:
    """One of each way in which values share a scale."""
    channels = KV_HEADS * head_dim
    static: dict[str, Any] = {"channels": channels, "bits": bits, "scale": torch.rand(channels) * 0.3 + 0.01}
    offset, size = torch.randn(channels), {"channels": channels, "bits": bits}
    made: Quantizer
    match kind:
        case "affine":
            made = Affine(**static, offset=offset)
        case "symmetric affine":
            made = Affine(**static)
        case "codebook":
            made = Codebook(**static, offset=offset, levels=torch.randn(1, 2**bits).sort(dim=1).values.half())
        case "codebook per channel":
            levels = torch.randn(channels, 2**bits).sort(dim=1).values.half()
            made = Codebook(**static, offset=offset, levels=levels)
        case "per token":
            made = DynamicAffine(**size)
        case "per token, a head":
            made = DynamicAffine(**size, group_size=head_dim)
        case "per token, quarter heads":
            made = DynamicAffine(**size, group_size=head_dim // 4, whole_zero_point=True)
        case "per token, symmetric":
            made = DynamicAffine(**size, symmetric=True)
        case "per channel, 64 tokens":
            made = DynamicAffine(**size, per="channel", group_size=64)
        case _:
            made = DynamicAffine(**size, per="channel", group_size=5, clip_ratio=0.9)
    return made.to(DEVICE)


def values(n_tokens: int, channels: int) -> Tensor:
    """Channels of different spread and middle, as keys have them."""
    return (torch.randn(n_tokens, channels) * torch.rand(channels) * 3 + torch.randn(channels)).to(DEVICE)


def found_and_wanted(
    keys: Quantizer,
    held: Quantizer,
    sizes: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    rotated: bool = False,
    group: int = 4,
) -> tuple[Tensor, Tensor]:
    """Attention over blocks of so many tokens by the kernels, and over what the quantizers decode, in float64."""
    head_dim = keys.channels // KV_HEADS
    q = torch.randn(group * KV_HEADS, head_dim).to(DEVICE, dtype)
    blocks, decoded = [], []
    for n_tokens in sizes:
        codes = [each.encode(values(n_tokens, each.channels)) for each in (keys, held)]
        angle = torch.rand(n_tokens, head_dim // 2, device=DEVICE).repeat(1, 2) * 6
        tables = torch.stack([angle.cos(), angle.sin()]) if rotated else None
        blocks.append(Block(codes[0], codes[1], n_tokens, tables))
        key, value = (
            each.decode(code).view(n_tokens, KV_HEADS, head_dim).transpose(0, 1)
            for each, code in zip((keys, held), codes, strict=True)
        )
        decoded.append((key if tables is None else rotate(key[None], *tables[:, None], "half")[0], value))
    attention = BlockAttention(q[:, None], KV_HEADS, Scoring(scaling=head_dim**-0.5))
    attention.add_splits(*attend_packed(q, (keys, held), blocks, head_dim**-0.5))
    key, value = (
        torch.cat(parts, dim=1).double().repeat_interleave(group, dim=0) for parts in zip(*decoded, strict=True)
    )
    scores = torch.einsum("hd,htd->ht", q.double(), key) * head_dim**-0.5
    return attention.result()[0], torch.einsum("ht,htd->hd", scores.softmax(-1), value)


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.skipif(INSIDE, reason="this is that process")
def test_every_kernel_agrees_with_the_torch_path_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "KVGAUGE_KERNELS": "1"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_without_triton_every_module_imports_and_no_kernel_is_chosen() -> None:
    code = """
import os, sys
sys.modules["triton"] = None  # as if it were not installed
os.environ.pop("KVGAUGE_KERNELS", None)
import torch, simquant, simquant.kernels.support as support
assert "simquant.kernels.attention" not in sys.modules
assert not support.runs_on(torch.device("cpu"))
os.environ["KVGAUGE_KERNELS"] = "1"
try:
    support.runs_on(torch.device("cuda"))
except ValueError as error:
    assert "pip install 'kvgauge[triton]'" in str(error)
else:
    raise AssertionError("asked for and missing, in silence")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_kernels_do_not_know_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("KVGAUGE_KERNELS", "1")
    assert not support.runs_on(torch.device("cpu"))
    monkeypatch.delenv("KVGAUGE_KERNELS")
    assert not support.runs_on(torch.device("cuda"))  # off unless asked for
    assert all(support.reads(quantizer(kind, bits)) for kind in KINDS for bits in BITS[1:])
    levels, one = torch.linspace(-1, 1, 4)[None].half(), torch.ones(8)
    assert not support.reads(DynamicCodebook(channels=8, bits=2, levels=levels))
    assert not support.reads(Codebook(channels=8, bits=2, scale=one, offset=one, levels=levels[:, :3]))
    assert not support.reads(DynamicAffine(channels=8, bits=4, per="channel"))
    assert not support.reads(DynamicAffine(channels=8, bits=5))


@inside
@pytest.mark.parametrize("place", range(len(KINDS)))
@pytest.mark.parametrize("bits", BITS)
def test_attention_reads_every_kind_as_the_torch_path_does(place: int, bits: int) -> None:
    if bits == 1 and "symmetric" in KINDS[place] + KINDS[place - 3]:
        pytest.skip("one bit around zero has one level")
    assert error(*found_and_wanted(quantizer(KINDS[place], bits), quantizer(KINDS[place - 3], bits), [77])) < 1e-5


@inside
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["affine", "codebook", "per token", "per token, quarter heads"])
def test_attention_in_16_bits_is_as_exact_as_16_bits_are(kind: str, dtype: torch.dtype, bound: float) -> None:
    found, wanted = found_and_wanted(quantizer(kind, 4), quantizer(kind, 4), [130], dtype)
    assert found.dtype == dtype
    assert error(found, wanted) < bound


@inside
@pytest.mark.parametrize("kind", ["affine", "codebook per channel", "per token, a head", "per channel, 64 tokens"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_keys_before_the_rotary_embedding_are_rotated_inside(kind: str, head_dim: int) -> None:
    sides = quantizer(kind, 4, head_dim), quantizer("per token", 4, head_dim)
    assert error(*found_and_wanted(*sides, [64, 20], rotated=True)) < 1e-5


@inside
@pytest.mark.parametrize("group", [1, 3, 12])
def test_any_number_of_queries_share_a_head(group: int) -> None:
    sides = quantizer("affine", 4), quantizer("per token, a head", 4)
    assert error(*found_and_wanted(*sides, [77], rotated=True, group=group)) < 1e-5


@inside
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_halves_of_a_head_that_are_no_whole_words_are_left_to_torch(bits: int) -> None:
    """A head of 32 channels at one bit once asked a kernel for no words at all."""
    model = build("llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=KV_HEADS).to(DEVICE)
    sides = {"key": quantizer("affine", bits, head_dim=32), "value": quantizer("per token", 4, head_dim=32)}
    quantizers = {
        Site(layer, tensor, "pre_rope" if tensor == "key" else None): sides[tensor]  # type: ignore[arg-type]
        for layer in range(2)
        for tensor in ("key", "value")
    }
    ids = torch.arange(3, 23, device=DEVICE)[None]
    with torch.no_grad(), packed_cache(model, quantizers) as new_cache:
        assert generate(model, ids, new_cache(), max_new_tokens=3).shape == (1, 23)


@inside
@pytest.mark.parametrize("sizes", [[1], [128, 128, 1], [300, 40]])
@pytest.mark.parametrize("waves", [1, 8])
def test_neither_blocks_nor_splits_change_the_result(
    sizes: list[int], waves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simquant.kernels.attention._WAVES", waves)
    assert error(*found_and_wanted(quantizer("affine", 4), quantizer("per token", 4), sizes)) < 1e-5


SINK = CachePolicy(sink_tokens=1, residual_tokens=4, block_tokens=5)
KIVI = CachePolicy(residual_tokens=1, block_tokens=5, values=ResidualWindow(residual_tokens=6))  # as kivi-2.yaml
RECIPES = {
    "KIVI": ("post_rope", "per channel, 5 tokens", "per token, quarter heads", KIVI),
    "KIVI before RoPE": ("pre_rope", "per channel, 5 tokens", "per token, quarter heads", SINK),
    "KVQuant": ("pre_rope", "codebook", "per token", SINK),
}


@inside
@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_a_packed_cache_decodes_by_kernels_what_it_decodes_by_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, keys, held, policy = RECIPES[name]
    model = build("llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=KV_HEADS).to(DEVICE)
    sides = {"key": quantizer(keys, 4, head_dim=32), "value": quantizer(held, 4, head_dim=32)}
    quantizers = {
        Site(layer, tensor, stage if tensor == "key" else None): sides[tensor]  # type: ignore[arg-type]
        for layer in range(2)
        for tensor in ("key", "value")
    }
    monkeypatch.setattr("simquant.cache.store.layer_store.BLOCK_TOKENS", 10)  # several blocks in a short text
    ids = torch.arange(3, 49, device=DEVICE).reshape(2, 23)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    calls = []
    add_packed = packed_reading.add_packed

    def counted(*args: Any) -> Any:
        calls.append(args)
        return add_packed(*args)

    monkeypatch.setattr("simquant.cache.store.layer_store.add_packed", counted)
    logits, texts = [], []
    for by_kernels in (True, False):
        monkeypatch.setattr("simquant.cache.store.packed_reading.runs_on", lambda device, yes=by_kernels: yes)
        with packed_cache(model, quantizers, policy=policy) as new_cache:
            cache = new_cache()
            rows = [step(model, cache, ids[:, :20], attention_mask=mask[:, :20])]
            rows += [step(model, cache, ids[:, n : n + 1], attention_mask=mask[:, : n + 1]) for n in range(20, 23)]
            logits.append(torch.cat(rows, dim=1))
            texts.append(generate(model, ids, new_cache(), max_new_tokens=3, attention_mask=mask))
        assert len(calls) == 2 * 2 * (3 + 2)  # layers, sequences, and steps of a single query
    assert error(logits[0], logits[1].double()) < 1e-5
    assert torch.equal(*texts)
