"""Triton kernels against the torch path: codes bit for bit, attention within rounding.

Triton decides when it is imported whether programs are interpreted. So the tests below run in a process of their own,
started by the one test that the suite sees; ``TRITON_INTERPRET=1 python -m pytest tests/simquant/kernels`` runs them
directly, and with 0 on a GPU.
"""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from artifacts.errors import MismatchError, NonFiniteError
from artifacts.model.rope import rotate
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from simquant.kernels import PackedTokens, PlainTokens, append, decode_attention

pytestmark = pytest.mark.shapes

INSIDE = "TRITON_INTERPRET" in os.environ
DEVICE = torch.device("cuda" if os.environ.get("TRITON_INTERPRET") == "0" else "cpu")
inside = pytest.mark.skipif(not INSIDE or find_spec("triton") is None, reason="runs in a process of its own")

BITS = (2, 3, 4, 8)
KV_HEADS, HEAD_DIM = 2, 64
CHANNELS = KV_HEADS * HEAD_DIM
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


def quantizer(kind: str, bits: int, channels: int = CHANNELS) -> Quantizer:
    """One of each way in which values share a scale."""
    static = {"channels": channels, "bits": bits, "scale": torch.rand(channels) * 0.3 + 0.01}
    offset, size = torch.randn(channels), {"channels": channels, "bits": bits}
    head = channels // KV_HEADS
    match kind:
        case "affine":
            return Affine(**static, offset=offset)
        case "symmetric affine":
            return Affine(**static)
        case "codebook":
            return Codebook(**static, offset=offset, levels=torch.randn(1, 2**bits).sort(dim=1).values.half())
        case "codebook per channel":
            return Codebook(**static, offset=offset, levels=torch.randn(channels, 2**bits).sort(dim=1).values.half())
        case "per token":
            return DynamicAffine(**size)
        case "per token, a head":
            return DynamicAffine(**size, group_size=head)
        case "per token, quarter heads":
            return DynamicAffine(**size, group_size=head // 4, whole_zero_point=True)
        case "per token, symmetric":
            return DynamicAffine(**size, symmetric=True)
        case "per channel, 64 tokens":
            return DynamicAffine(**size, per="channel", group_size=64)
        case _:
            return DynamicAffine(**size, per="channel", group_size=5, clip_ratio=0.9)


def values(n_tokens: int, channels: int = CHANNELS) -> Tensor:
    """Channels of different spread and middle, as keys have them."""
    return torch.randn(n_tokens, channels) * torch.rand(channels) * 3 + torch.randn(channels)


def packed(keys: Quantizer, stored: Quantizer, n_tokens: int, batch: int = 1, **more: object) -> PackedTokens:
    """Random tokens, encoded by the torch path."""
    codes = [each.encode(values(batch * n_tokens).to(DEVICE)) for each in (keys.to(DEVICE), stored.to(DEVICE))]
    return PackedTokens(
        key_quantizer=keys.to(DEVICE),
        keys=codes[0],
        value_quantizer=stored.to(DEVICE),
        values=codes[1],
        batch=batch,
        **more,  # type: ignore[arg-type]
    )


def unpacked(tokens: PackedTokens) -> PlainTokens:
    """The same tokens as the torch path reads them."""
    decoded = [
        each.decode(codes).view(tokens.batch, tokens.n_tokens, KV_HEADS, HEAD_DIM).transpose(1, 2)
        for each, codes in ((tokens.key_quantizer, tokens.keys), (tokens.value_quantizer, tokens.values))
    ]
    return PlainTokens(keys=decoded[0], values=decoded[1], live=tokens.live)


def reference(q: Tensor, *sources: PlainTokens) -> Tensor:
    """Softmax over all live tokens of all sources, in float64."""
    scores, found = [], []
    for source in sources:
        group = q.shape[1] // source.keys.shape[1]
        keys, held = (t.double().repeat_interleave(group, dim=1) for t in (source.keys, source.values))
        score = torch.einsum("bhd,bhtd->bht", q.double(), keys) / math.sqrt(q.shape[2])
        if source.live is not None:
            position = torch.arange(source.n_tokens, device=q.device)
            first, last = (end.to(q.device)[:, None, None] for end in source.live)
            score = score.masked_fill((position < first) | (position >= last), -torch.inf)
        scores.append(score)
        found.append(held)
    return torch.einsum("bht,bhtd->bhd", torch.cat(scores, -1).softmax(-1), torch.cat(found, 2))


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def queries(group: int = 4, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """One query token per sequence."""
    return torch.randn(batch, KV_HEADS * group, HEAD_DIM).to(DEVICE, dtype)


@pytest.mark.skipif(INSIDE, reason="this is that process")
def test_every_kernel_agrees_with_the_torch_path_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[3]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_without_triton_everything_imports_and_a_kernel_says_what_to_install() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import simquant
assert "simquant.kernels" not in sys.modules
from simquant.kernels.attention import merge
merge[(1,)]
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert "ImportError: simquant.kernels: Triton" in run.stderr
    assert "pip install 'kvgauge[triton]'" in run.stderr


def test_a_quantizer_without_a_kernel_is_refused() -> None:
    levels = torch.linspace(-1, 1, 4)[None].half()
    with pytest.raises(NotImplementedError, match="dynamic_codebook: kernels know affine"):
        append(DynamicCodebook(channels=8, bits=2, levels=levels), torch.zeros(1, 8))


@inside
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_append_stores_what_the_quantizer_stores(kind: str, bits: int) -> None:
    for n_tokens, dtype in ((1, torch.float16), (7, torch.float32)):
        x, each = values(n_tokens, channels=24).to(DEVICE, dtype), quantizer(kind, bits, channels=24).to(DEVICE)
        found, wanted = append(each, x), each.encode(x)
        assert found.tensors.keys() == wanted.tensors.keys()
        for name, tensor in wanted.tensors.items():
            assert found.tensors[name].dtype == tensor.dtype
            assert torch.equal(found.tensors[name], tensor), (name, n_tokens)


@inside
@pytest.mark.parametrize("bits", [1, 5, 7])
def test_append_packs_every_width_and_pads_rows(bits: int) -> None:
    each, x = quantizer("per token", bits, channels=13).to(DEVICE), values(3, channels=13).bfloat16().to(DEVICE)
    assert torch.equal(append(each, x).tensors["codes"], each.encode(x).tensors["codes"])


@inside
def test_append_keeps_constants_and_steps_on_ties() -> None:
    constant = torch.tensor([[0.1] * 8, [0.0] * 8, [-3.0] * 8], device=DEVICE)
    dynamic = DynamicAffine(channels=8, bits=2)
    for name, tensor in dynamic.encode(constant).tensors.items():
        assert torch.equal(append(dynamic, constant).tensors[name], tensor)
    ties = (torch.arange(8, device=DEVICE) / 2 - 0.5)[None]  # every other value lies between two codes
    static = Affine(channels=8, bits=2, scale=torch.ones(8), offset=torch.zeros(8)).to(DEVICE)
    assert torch.equal(append(static, ties).tensors["codes"], static.encode(ties).tensors["codes"])


@inside
def test_append_refuses_what_the_quantizer_refuses() -> None:
    each = quantizer("per token", 4)
    with pytest.raises(MismatchError):
        append(each, torch.zeros(2, 8))
    with pytest.raises(NonFiniteError):
        append(each, torch.full((1, CHANNELS), torch.nan))
    assert append(each, torch.zeros(0, CHANNELS)).nbytes == 0


@inside
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_append_refuses_a_scale_beyond_float16() -> None:
    with pytest.raises(NonFiniteError, match="does not fit float16"):
        append(quantizer("per token", 4).to(DEVICE), torch.full((1, CHANNELS), 1e6, device=DEVICE))


@inside
@pytest.mark.parametrize("place", range(len(KINDS)))
@pytest.mark.parametrize("bits", BITS)
def test_attention_reads_every_kind_as_the_torch_path_does(place: int, bits: int) -> None:
    tokens = packed(quantizer(KINDS[place], bits), quantizer(KINDS[place - 3], bits), n_tokens=77)
    q = queries()
    assert error(decode_attention(q, tokens), reference(q, unpacked(tokens))) < 1e-5


@inside
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["affine", "codebook", "per token", "per token, quarter heads"])
def test_attention_in_16_bits_is_as_exact_as_16_bits_are(kind: str, dtype: torch.dtype, bound: float) -> None:
    tokens, q = packed(quantizer(kind, 4), quantizer(kind, 4), n_tokens=130), queries(dtype=dtype)
    found = decode_attention(q, tokens, splits=2)
    assert found.dtype == dtype
    assert error(found, reference(q, unpacked(tokens))) < bound


@inside
@pytest.mark.parametrize("group", [1, 4, 8, 12])
def test_query_heads_share_the_keys_of_their_group(group: int) -> None:
    tokens, q = packed(quantizer("affine", 4), quantizer("per token", 2), n_tokens=33), queries(group)
    assert error(decode_attention(q, tokens), reference(q, unpacked(tokens))) < 1e-5


@inside
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_heads_may_have_several_sizes(head_dim: int) -> None:
    keys, held = torch.randn(2, 1, 3, 20, head_dim, device=DEVICE)
    q, each = torch.randn(1, 6, head_dim, device=DEVICE), quantizer("affine", 3, channels=3 * head_dim).to(DEVICE)
    codes = [each.encode(x.transpose(1, 2).reshape(20, -1)) for x in (keys, held)]
    tokens = PackedTokens(key_quantizer=each, keys=codes[0], value_quantizer=each, values=codes[1])
    keys, held = (each.decode(c).view(1, 20, 3, head_dim).transpose(1, 2) for c in codes)
    assert error(decode_attention(q, tokens), reference(q, PlainTokens(keys=keys, values=held))) < 1e-5


@inside
@pytest.mark.parametrize("n_tokens", [1, 128, 300])
@pytest.mark.parametrize("splits", [1, 2, 64])
def test_splits_do_not_change_the_result(n_tokens: int, splits: int) -> None:
    tokens, q = packed(quantizer("affine", 4), quantizer("per token", 4), n_tokens), queries()
    assert error(decode_attention(q, tokens, splits=splits), reference(q, unpacked(tokens))) < 1e-5


@inside
def test_padding_gets_no_weight() -> None:
    live = (torch.tensor([0, 130, 40]), torch.tensor([150, 150, 41]))
    tokens = packed(quantizer("per token", 4), quantizer("affine", 2), n_tokens=150, batch=3, live=live)
    q = queries(batch=3)
    assert error(decode_attention(q, tokens, splits=2), reference(q, unpacked(tokens))) < 1e-5


@inside
def test_a_sequence_without_a_live_token_gives_zero() -> None:
    live = (torch.tensor([0, 5]), torch.tensor([9, 5]))
    tokens, q = packed(quantizer("affine", 4), quantizer("affine", 4), 9, batch=2, live=live), queries(batch=2)
    found = decode_attention(q, tokens)
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert found[0].abs().max() > 0


@inside
@pytest.mark.parametrize("n_packed", [0, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_tokens_join_the_packed_ones(n_packed: int, dtype: torch.dtype) -> None:
    tokens, q = packed(quantizer("affine", 4), quantizer("per token", 4), n_packed), queries()
    recent = torch.randn(2, 1, KV_HEADS, 9, HEAD_DIM, device=DEVICE).to(dtype)
    exact = PlainTokens(keys=recent[0], values=recent[1], live=(torch.tensor([2]), torch.tensor([9])))
    bound = 1e-5 if dtype == torch.float32 or DEVICE.type == "cpu" else 2e-2
    assert error(decode_attention(q, tokens, exact), reference(q, unpacked(tokens), exact)) < bound


@inside
@pytest.mark.parametrize("kind", ["affine", "codebook per channel", "per token, a head", "per channel, 64 tokens"])
@pytest.mark.parametrize("tables_of", [1, 2])
def test_keys_before_the_rotary_embedding_are_rotated_inside(kind: str, tables_of: int) -> None:
    angle = torch.rand(tables_of, 64, HEAD_DIM // 2, device=DEVICE).repeat(1, 1, 2) * 6
    tables = (angle.cos(), angle.sin())
    tokens = packed(quantizer(kind, 4), quantizer("per token", 4), n_tokens=64, batch=2, tables=tables)
    before, q = unpacked(tokens), queries(batch=2)
    after = PlainTokens(keys=rotate(before.keys, *tables, "half"), values=before.values)
    assert error(decode_attention(q, tokens), reference(q, after)) < 1e-5


@inside
def test_one_decode_step_runs_on_appended_codes() -> None:
    keys, held = quantizer("affine", 4).to(DEVICE), quantizer("per token", 4).to(DEVICE)
    x = values(12).to(DEVICE)
    tokens = PackedTokens(key_quantizer=keys, keys=append(keys, x), value_quantizer=held, values=append(held, x))
    q = queries()
    assert error(decode_attention(q, tokens), reference(q, unpacked(tokens))) < 1e-5


def test_sizes_that_do_not_fit_are_refused() -> None:
    tokens = packed(quantizer("affine", 4), quantizer("affine", 4), n_tokens=4)
    with pytest.raises(MismatchError, match="same layer and batch"):
        decode_attention(queries(batch=2), tokens)
    with pytest.raises(ValueError, match="head_dim must be"):
        decode_attention(torch.zeros(1, 2, 48), tokens)
    with pytest.raises(ValueError, match="got neither"):
        decode_attention(queries())
    with pytest.raises(ValueError, match="splits must be from 1 to 64; got 0"):
        decode_attention(queries(), tokens, splits=0)
    with pytest.raises(NotImplementedError, match=r"unpacks \(1, 2, 3, 4, 8\) bits; got 5"):
        decode_attention(queries(), packed(quantizer("affine", 5), quantizer("affine", 4), n_tokens=4))
    spanning = packed(quantizer("per channel, 5 tokens", 4), quantizer("affine", 4), n_tokens=4, batch=2)
    with pytest.raises(ValueError, match="Encode each sequence in whole groups"):
        decode_attention(queries(batch=2), spanning)
