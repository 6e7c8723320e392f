"""Entropy-coded indices: what streams hold, what they take, and how steps and tables are found."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from constriction import stream
from helpers.quantizers import SITE, dynamic, entropy_coded, rotated, tokens
from torch import Tensor

from artifacts.coding.frequency_coder import LARGEST_INDEX, TOTAL, FrequencyCoder
from artifacts.coding.span import Span
from artifacts.quantizers.entropy_coded import EntropyCoded
from calib.estimators import EntropyCodedEstimator, RotatedEstimator
from calib.estimators import entropy_coded as entropy_coded_estimator
from calib.estimators.estimator import Fit, trial_statistics
from calib.statistics.site_shape import SiteShape

pytestmark = pytest.mark.shapes

HEADS, HEAD_DIM = 4, 16
CHANNELS = HEADS * HEAD_DIM
SHAPE = SiteShape(site=SITE, heads=HEADS, head_dim=HEAD_DIM)


def table(*frequencies: int) -> np.ndarray:
    """With an escape symbol that takes what is left."""
    return np.array([*frequencies, TOTAL - sum(frequencies)], dtype=np.int16)


def falling(n_tokens: int, seed: int = 0) -> Tensor:
    """Channels from wide to narrow, as behind a rotation."""
    x = torch.randn(n_tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(1, -2, CHANNELS) + torch.linspace(-1, 1, CHANNELS)


def fitted(x: Tensor, **options: float) -> Fit:
    return EntropyCodedEstimator(**options).fit(trial_statistics(SHAPE).mapped(x))


def indices(quantizer: EntropyCoded, x: Tensor) -> Tensor:
    return ((x - quantizer.offset) / quantizer.step).round()


def naive_bits(quantizer: EntropyCoded, x: Tensor) -> float:
    """Symbol by symbol; an escaped one takes 5 bits more, and those of its distance after the leading one."""
    tables = quantizer.frequencies.split((quantizer.n_indices + 1).tolist())
    bits = 0.0
    for frequencies, first, column in zip(tables, quantizer.first.tolist(), indices(quantizer, x).T, strict=True):
        for place in (column.int() - first).tolist():
            n = len(frequencies) - 1
            inside = 0 <= place < n
            bits -= math.log2(int(frequencies[place if inside else n]) / TOTAL)
            if not inside:
                bits += 5 + math.floor(math.log2(2 * (place - n) + 2 if place >= n else 1 - 2 * place))
    return bits


# ---- streams


@pytest.mark.parametrize("n_tokens", [1, 7, 300])
def test_every_index_comes_back(n_tokens: int) -> None:
    coder = FrequencyCoder([-1, 0, -512], [table(9, 30000, 1), table(TOTAL - 1), table(*[31] * 1025)])
    far = [-LARGEST_INDEX, LARGEST_INDEX, -2, 2, 1, -513, 513, 514, 0]
    for seed, spread in itertools.product(range(3), (0, 1, 3, 900)):
        found = np.random.default_rng(seed).integers(-spread, spread + 1, (3, n_tokens), dtype=np.int32)
        found[:, :: len(far)] = far[(seed + spread) % len(far)]
        assert np.array_equal(coder.decode(coder.encode(found), n_tokens), found)


def test_streams_are_frozen() -> None:
    """They are part of the file format; 300 and -4 are in no table."""
    coder = FrequencyCoder([-1, 0], [table(8192, 16384, 8188), table(32000, 700)])
    found = np.array([[0, 1, -1, 0, 300, 0], [0, 0, 1, 0, 0, -4]], dtype=np.int32)
    assert coder.encode(found).tolist() == [2784966114, 620299181]


def test_a_stream_of_other_tokens_is_refused() -> None:
    quantizer, x = entropy_coded(24, 3), tokens(4)
    words = quantizer.encode(x).tensors["words"].numpy().view(np.uint32)
    with pytest.raises(ValueError, match="is not that of 1 tokens"):
        quantizer._coder.decode(words, 1)
    with pytest.raises(ValueError, match="8 tokens must have 2 streams of 4 tokens; got 1"):
        quantizer.decode(
            replace(quantizer.encode(x), shape=(8, 24), spans={"counts": Span(8), "words": Span(8, "counts")})
        )
    with pytest.raises(ValueError, match="counts has 1 entries; 8 tokens with 1 for each 4 need 2"):
        replace(quantizer.encode(x), shape=(8, 24))


def test_no_panic_leaves_the_coder() -> None:
    """Damaged streams, and true ones of other tokens, ended in a panic of Rust, which no `except Exception` catches."""
    tables, draw = [table(8192, 16384, 8188)] * 2, np.random.default_rng(0)
    coder = FrequencyCoder([-1, -1], tables)
    words = coder.encode(np.array([[0, 1, 0, -1, 70, 3]] * 2, dtype=np.int32))
    refusals = []
    for _ in range(1000):
        damaged = words.copy()
        damaged[draw.integers(len(words))] ^= np.uint32(1) << np.uint32(draw.integers(32))
        try:
            coder.decode(damaged, int(draw.integers(8)))
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 500
    assert all("FrequencyCoder: the stream of 4 words is not that of" in refusal for refusal in refusals)


def test_a_panic_becomes_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should constriction ever find another reason for one."""
    monkeypatch.setattr("artifacts.coding.frequency_coder._LONGEST", 31)
    frequencies = table(8192, 16384, 8188)
    encoder = stream.queue.RangeEncoder()
    encoder.encode(
        np.array([3], dtype=np.int32), stream.model.Categorical(frequencies.astype(np.float32), perfect=False)
    )
    encoder.encode(np.array([31], dtype=np.int32), stream.model.Uniform(32))
    with pytest.raises(ValueError, match=r"the stream of 1 words is not that of 1 tokens \(assertion failed"):
        FrequencyCoder([-1], [frequencies]).decode(encoder.get_compressed(), 1)


@pytest.mark.parametrize("index", [LARGEST_INDEX + 1, 2**31 - 1, -(2**31)])
def test_indices_beyond_the_largest_are_refused(index: int) -> None:
    """They were coded as others, or ended in a panic."""
    with pytest.raises(ValueError, match=f"expected indices from -1048576 to 1048576; got .*{index}"):
        FrequencyCoder([-1], [table(8192, 16384, 8188)]).encode(np.array([[index]], dtype=np.int32))


def test_an_index_stands_for_its_shifted_middle() -> None:
    quantizer, x = entropy_coded(24, 5), tokens(50)
    index = indices(quantizer, x)
    known = index.abs() <= 7
    shift = torch.where(known, -0.01 * index, 0).half().float()
    assert known.any()
    assert (~known).any()
    assert torch.allclose(quantizer.simulate(x), quantizer.offset + quantizer.step * (index + shift), atol=1e-6)


def test_a_token_is_decoded_alike_in_any_company() -> None:
    quantizer, x = rotated(entropy_coded(24, 3)), tokens(13)
    assert quantizer.is_causal
    assert not dynamic(24, 3, per="channel", group_size=4).is_causal
    assert torch.equal(torch.cat([quantizer.simulate(token) for token in x.split(1)]), quantizer.simulate(x))


def test_values_that_were_never_seen_come_back_and_are_counted() -> None:
    quantizer, x = entropy_coded(24, 3), tokens(40).clamp(-3, 3)
    further = x.clone()
    further[::5, 3] = torch.linspace(-900, 900, 8)
    assert quantizer.outside(further).sum() > quantizer.outside(x).sum()
    assert ((quantizer.simulate(further) - further).abs() <= 0.51 * quantizer.step + 1e-4)[::5, 3].all()
    assert quantizer.encode(further).nbytes > quantizer.encode(x).nbytes
    assert torch.equal(quantizer.simulate(further)[1::5], quantizer.simulate(x)[1::5])


@pytest.mark.parametrize("bits", [0.45, 1.0, 3.0])
def test_bytes_are_within_two_percent_of_the_cross_entropy(bits: float) -> None:
    quantizer, x = fitted(falling(4096), bits=bits).quantizer, falling(2048, seed=1)
    assert isinstance(quantizer, EntropyCoded)
    ideal = naive_bits(quantizer, x)
    assert quantizer.ideal_bits(x) == pytest.approx(ideal, rel=1e-9)
    assert ideal <= 8 * quantizer.encode(x).nbytes <= 1.02 * ideal


# ---- fits


@pytest.mark.parametrize("bits", [0.3, 0.45, 0.88, 1.44, 4.0])
def test_other_tokens_take_the_bits_that_were_asked_for(bits: float) -> None:
    quantizer, x = fitted(falling(4096), bits=bits).quantizer, falling(2048, seed=1)
    assert 8 * quantizer.encode(x).nbytes / x.numel() == pytest.approx(bits, rel=0.02)
    assert quantizer.spec.bits == pytest.approx(bits, rel=0.03)


def test_more_bits_have_finer_steps_and_smaller_errors() -> None:
    x = falling(2048)
    found = [fitted(x, bits=bits).quantizer for bits in (0.1, 0.5, 1, 2, 4, 8)]
    steps = [float(quantizer.step) for quantizer in found]
    errors = [float((quantizer.simulate(x) - x).square().mean()) for quantizer in found]
    assert steps == sorted(steps, reverse=True)
    assert errors == sorted(errors, reverse=True)


def test_means_have_smaller_squared_errors_than_middles() -> None:
    x, fresh = falling(4096), falling(2048, seed=1)
    found = [fitted(x, bits=0.7, centroids=share).quantizer for share in (0.0, 0.5, 1.0)]
    errors = [float((quantizer.simulate(fresh) - fresh).square().mean()) for quantizer in found]
    assert errors == sorted(errors, reverse=True)
    assert found[0].shifts is None
    assert found[0].static_bytes < found[1].static_bytes


def test_constant_channels_come_back_exactly() -> None:
    x = falling(500)
    x[:, 3], x[:, 9] = 0.1, 0.0
    assert torch.equal(fitted(x).quantizer.simulate(x)[:, [3, 9]], x[:, [3, 9]])
    assert torch.equal(fitted(x[:1].repeat(300, 1)).quantizer.simulate(x[:1]), x[:1])


@pytest.mark.parametrize("dead", [0.1, 0.3, 0.5, 0.97])
def test_channels_that_never_change_leave_rates_that_no_step_reaches(dead: float) -> None:
    """The search for a step once went on for ever, to the smallest number there is and with it."""
    x = falling(500)
    x[:, : round(dead * CHANNELS)] = 0.5
    steps = fitted(x, bits=1.0).priced().steps
    assert sum(bits for _, bits in steps) <= 8 * CHANNELS
    gains = [gain for gain, _ in steps]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0


def test_what_other_bits_would_cost_is_found_for_a_budget_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It once took as long as the fit, and nobody read it."""
    monkeypatch.setattr(entropy_coded_estimator, "trade", lambda *_: pytest.fail("nobody asked"))
    assert fitted(falling(500), bits=1.0).kept().priced().steps == ()


def test_heads_that_repeat_each_other_are_fitted() -> None:
    """Half of the components of a layer hold rounding alone then."""
    x = falling(500)
    x[:, CHANNELS // 2 :] = x[:, : CHANNELS // 2]
    estimator = RotatedEstimator(scope="layer", inner={"method": "entropy_coded", "bits": 1.0})
    quantizer = estimator.fit(trial_statistics(SHAPE).mapped(x)).quantizer
    assert 8 * quantizer.encode(x).nbytes / x.numel() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("scale", [1e-39, 1e-30, 1e30])
def test_values_at_the_ends_of_float32_are_fitted(scale: float) -> None:
    """The smallest positive step was once halved for ever too."""
    quantizer = fitted(falling(500) * scale, bits=2.0).quantizer
    assert torch.isfinite(quantizer.simulate(falling(500) * scale)).all()


@pytest.mark.parametrize(("live", "bits"), [(64, 8.0), (32, 6.0), (24, 6.0), (1, 0.5)])
def test_a_rate_that_few_channels_hardly_reach_is_not_exceeded(live: int, bits: float) -> None:
    """Escaped values once counted 8 bits however far they lie, and streams took nearly twice what was asked for."""
    x = falling(500)
    x[:, live:] = 0.5
    quantizer = fitted(x, bits=bits).quantizer
    assert 8 * quantizer.encode(x).nbytes / x.numel() <= 1.01 * bits
    assert (quantizer.simulate(x) - x).abs().max() < 0.05


def test_far_values_do_not_stretch_the_tables() -> None:
    x = falling(500)
    x[7, 0] = 1e5
    quantizer = fitted(x, bits=4).quantizer
    assert quantizer.n_indices.max() <= 2 * 512 + 1
    assert quantizer.outside(x)[7, 0]
    assert torch.allclose(quantizer.simulate(x), x, atol=float(quantizer.step))


def test_streams_that_take_all_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^layers\.3\.key\.pre_rope: bits must exceed .* got 0\.5"):
        fitted(falling(50), bits=0.5, group_tokens=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2.0}, "as frequencies says; got 2.0"),
        ({"group_tokens": 0}, "group_tokens must be at least 1; got 0"),
        ({"step": torch.zeros(1)}, "step must be finite and positive"),
        ({"n_indices": torch.zeros(24, dtype=torch.int16)}, "n_indices must be at least 1; got 0"),
        ({"frequencies": torch.ones(24 * 16, dtype=torch.int16)}, "32768 in each table"),
        ({"frequencies": torch.ones(24 * 15, dtype=torch.int16)}, r"frequencies must be int16 of shape \(384,\)"),
        ({"shifts": torch.full((24 * 15,), 2.0).half()}, "shifts must be from -1 to 1"),
        ({"shifts": torch.zeros(3).half()}, r"shifts must be float16 of shape \(360,\)"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entropy_coded(24, 3).replace(**changes)
