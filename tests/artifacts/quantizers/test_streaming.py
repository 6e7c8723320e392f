"""The streaming quantizer against a naive loop; its promotions, state and bytes; the option names of its seed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.packing import unpack
from artifacts.errors import MismatchError, NonFiniteError
from artifacts.quantizers.streaming import Streaming, StreamingState
from artifacts.sites import Site
from calib.estimators import StreamingEstimator
from calib.recipe.compression_config import compression_config
from calib.recipe.recipe import Recipe
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

pytestmark = pytest.mark.shapes

SITE = Site(3, "key", "pre_rope")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relative": {"outlier_threshold_relative": 1.4},
    "absolute": {"outlier_threshold_abs": 4.0, "high_bits": 6},
    "both": {"outlier_threshold_relative": 1.8, "outlier_threshold_abs": 4.0, "decay": 0.9},
    "groups": {"outlier_threshold_relative": 1.2, "groups": 4, "decay": 0.9},
    "one group": {"outlier_threshold_relative": 1.2, "groups": 1},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def streaming(bits: int = 3, channels: int = 12, **options: Any) -> Streaming:
    return Streaming(channels=channels, bits=bits, **{"chunk_tokens": 5, "decay": 0.5, **options})


def bursts(n_tokens: int = 33, channels: int = 12) -> Tensor:
    """Channels of different sizes, each of which is several times as large for some tokens."""
    x = torch.randn(n_tokens, channels) * torch.linspace(0.2, 2, channels)
    return x * torch.where(torch.rand(n_tokens, channels) < 0.05, 6.0, 1.0)


def half_up(x: float) -> np.float32:
    half = np.float16(x)
    return np.float32(half if float(half) >= x else np.nextafter(half, np.float16(np.inf)))


def naive(q: Streaming, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunking, scales and widths of all values, chunk by chunk and group by group, from the published description."""
    steps, scales, widths = np.zeros_like(x), np.zeros_like(x), np.zeros(x.shape, int)
    relative, absolute = (t or np.inf for t in (q.outlier_threshold_relative, q.outlier_threshold_abs))
    for channels in np.split(np.arange(x.shape[1]), q.groups or x.shape[1]):
        e = None
        for at in (
            np.ix_(rows, channels)
            for rows in np.split(np.arange(len(x)), range(q.chunk_tokens, len(x), q.chunk_tokens))
        ):
            m = float(np.abs(x[at]).max())
            e = m if e is None else q.decay * e + (1 - q.decay) * m
            promoted = m > relative * e or m > absolute
            width = q.high_bits if promoted else q.bits
            scale = half_up((m if promoted else e) / (2 ** (width - 1) - 1))
            steps[at] = np.clip(np.round(x[at] / scale), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
            scales[at], widths[at] = scale, width
    return steps, scales, widths


def packed(steps: np.ndarray, width: int) -> bytes:
    """The steps of a chunk, each raised by half its range, as bits, the least significant first."""
    codes = steps.astype(int).ravel() + 2 ** (width - 1)
    return np.packbits((codes[:, None] >> np.arange(width)) & 1, bitorder="little").tobytes()


def mask(q: Streaming, codes: Codes) -> Tensor:
    """Promoted groups of each chunk."""
    return unpack(codes.tensors["promoted"], 1, q.groups or q.channels).bool()


def joined(parts: list[Codes]) -> dict[str, Tensor]:
    return {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# The method


@every_setting
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_codes_and_values_are_those_of_the_naive_loop(setting: str, bits: int) -> None:
    q, x = streaming(bits, **SETTINGS[setting]), bursts()
    steps, scales, widths = naive(q, x.numpy())
    codes = q.encode(x)
    assert np.array_equal(q.decode(codes).numpy(), steps * scales)
    for name, width in (("codes", q.bits), ("high_codes", q.high_bits)):
        chunks = [slice(start, start + q.chunk_tokens) for start in range(0, len(x), q.chunk_tokens)]
        expected = b"".join(packed(steps[rows][:, widths[rows][0] == width], width) for rows in chunks)
        assert bytes(codes.tensors[name].tolist()) == expected
    assert (widths == q.high_bits).any() == (setting != "plain"), "the case must promote something"


def test_a_channel_is_promoted_exactly_where_it_outgrows_its_past() -> None:
    """At threshold 3 and decay 0.9 that is beyond 2.7 / 0.7 = 3.857 times the running maximum before the chunk."""
    q = streaming(channels=3, decay=0.9, outlier_threshold_relative=3.0)
    growth = torch.tensor([3.85, 3.86, 1.0])
    codes = q.encode(torch.cat([torch.ones(5, 3), -growth.expand(5, 3)]))
    assert mask(q, codes).tolist() == [[False, False, False], [False, True, False]]
    running = 0.9 + 0.1 * growth
    expected = torch.where(growth == 3.86, growth / 127, running / 3)
    torch.testing.assert_close(codes.tensors["scale"][1].float(), expected, rtol=1e-3, atol=0)


def test_the_absolute_threshold_is_exclusive_and_holds_from_the_first_chunk() -> None:
    q = streaming(channels=3, outlier_threshold_abs=2.0)
    codes = q.encode(torch.tensor([[2.0, -2.5, 0.0]]))
    assert mask(q, codes).tolist() == [[False, True, False]]


@every_setting
def test_error_is_half_a_step_and_what_lies_beyond_saturates(setting: str) -> None:
    q, x = streaming(**SETTINGS[setting]), bursts(200)
    y = q.simulate(x)
    _, scale, width = (torch.from_numpy(each) for each in naive(q, x.numpy()))
    low, high = -(2.0 ** (width - 1)) * scale, (2.0 ** (width - 1) - 1) * scale
    inside = (x >= low - scale / 2) & (x <= high + scale / 2)
    assert ((y - x).abs() <= 0.5001 * scale)[inside].all()
    assert torch.equal(y[~inside], torch.where(x > 0, high, low)[~inside])
    assert not inside.all(), "some ordinary channel must saturate"
    assert inside[width == q.high_bits].all(), "nothing that is promoted saturates"


@every_setting
def test_later_chunks_change_nothing_about_earlier_ones(setting: str) -> None:
    q, x = streaming(**SETTINGS[setting]), bursts()
    changed = x.clone()
    changed[10:15] *= -7
    one, other, before = q.encode(x), q.encode(changed), q.encode(x[:10])
    for name, tensor in before.tensors.items():
        assert torch.equal(one.tensors[name][: len(tensor)], tensor)
        assert torch.equal(other.tensors[name][: len(tensor)], tensor)
    assert torch.equal(q.decode(one)[:10], q.decode(other)[:10])
    assert not torch.equal(q.decode(one)[15:], q.decode(other)[15:]), "later chunks do remember"


@every_setting
def test_values_are_decoded_with_the_scale_that_is_stored(setting: str) -> None:
    q = streaming(**SETTINGS[setting])
    codes = q.encode(bursts())
    assert codes.tensors["scale"].dtype == torch.float16
    doubled = replace(codes, tensors={**codes.tensors, "scale": 2 * codes.tensors["scale"]})
    assert torch.equal(q.decode(doubled), 2 * q.decode(codes))


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_constants_come_back_to_the_precision_of_the_scale(setting: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, -0.3, 500.0]).repeat(3).expand(17, 12).to(dtype)
    q = streaming(**{**SETTINGS[setting], "groups": 0})
    y = q.simulate(x)
    assert ((y - x).float().abs() <= 2**-7 * x.float().abs()).all()
    assert torch.equal(y[:, ::4], x[:, ::4])


@every_setting
def test_zeros_and_tiny_values_stay_so(setting: str) -> None:
    q = streaming(**SETTINGS[setting])
    assert torch.equal(q.simulate(torch.zeros(7, 12)), torch.zeros(7, 12))
    assert q.simulate(torch.full((7, 12), 1e-30)).abs().max() == 0
    x = 1e-6 * bursts()
    assert q.simulate(x).abs().max() <= 2 * x.abs().max()


def test_values_whose_scale_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"^layers\.3\.key\.pre_rope: .*65504"):
        streaming(bits=2).at(SITE).encode(torch.full((2, 12), 1e6))
    assert streaming(bits=8).simulate(torch.full((2, 12), 1e6)).isfinite().all()


# Bytes


def test_bytes_are_those_counted_by_hand() -> None:
    """Five tokens in chunks of 2, 2 and 1; of six channels two are promoted in the second chunk."""
    x = torch.ones(5, 6)
    x[2:4, 1:3] = 100
    q = streaming(channels=6, chunk_tokens=2, outlier_threshold_abs=10.0)
    codes = q.encode(x)
    sizes = {name: tensor.nbytes for name, tensor in codes.tensors.items()}
    # 12, 8 and 6 codes of 3 bits, each chunk in whole bytes; 4 codes of 8 bits; 6 scales of 2 bytes; 6 bits of mask.
    assert sizes == {"codes": 5 + 3 + 3, "high_codes": 4, "scale": 3 * 6 * 2, "promoted": 3}
    assert codes.nbytes == 54
    without = streaming(channels=6, chunk_tokens=2).encode(x)
    assert without.nbytes == 5 + 5 + 3 + 36
    assert streaming(channels=6, chunk_tokens=2, groups=2).encode(x).nbytes == 5 + 5 + 3 + 3 * 2 * 2


def test_long_chunks_cost_little_more_than_their_codes() -> None:
    x = torch.randn(1024, 64)
    codes = streaming(4, 64, chunk_tokens=512, outlier_threshold_relative=3.0).encode(x)
    assert codes.nbytes * 8 / x.numel() == pytest.approx(4 + (16 + 1) / 512)


def test_no_tokens_are_no_bytes() -> None:
    for options in SETTINGS.values():
        q = streaming(**options)
        codes, state = q.encode_from(torch.empty(0, 12), q.start)
        assert codes.nbytes == q.encode(torch.empty(0, 12)).nbytes == 0
        assert q.decode(codes).shape == (0, 12)
        assert state.n_chunks == 0


# The state


@every_setting
@pytest.mark.parametrize("sizes", [[5] * 6 + [3], [15, 18], [0, 30, 3], [5, 25, 0, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_chain_of_states_gives_the_codes_of_one_call(setting: str, sizes: list[int], dtype: torch.dtype) -> None:
    q, x = streaming(**SETTINGS[setting]), bursts().to(dtype)
    state, parts, decoded = q.start, [], []
    for part in x.split(sizes):
        codes, state = q.encode_from(part, state)
        parts.append(codes)
        decoded.append(q.decode(codes))
    whole = q.encode(x)
    assert_same(joined(parts), dict(whole.tensors))
    assert torch.equal(torch.cat(decoded), q.decode(whole))
    _, at_once = q.encode_from(x, q.start)
    assert torch.equal(state.absmax, at_once.absmax)
    assert state.n_chunks == at_once.n_chunks == 7


def test_the_running_maximum_is_the_published_average() -> None:
    q = streaming(channels=2, chunk_tokens=2, decay=0.75)
    _, state = q.encode_from(torch.tensor([[1.0, -4.0], [0.0, 2.0], [3.0, 0.0], [-5.0, 0.0]]), q.start)
    assert state.absmax.tolist() == [0.75 * 1 + 0.25 * 5, 0.75 * 4]
    assert q.tokens_per_scale == 2


def test_encoding_leaves_the_state_it_started_from_alone() -> None:
    q, x = streaming(outlier_threshold_relative=1.8), bursts()
    _, state = q.encode_from(x[:10], q.start)
    kept = state.absmax.clone()
    first, _ = q.encode_from(x[10:], state)
    second, _ = q.encode_from(x[10:], state)
    assert torch.equal(state.absmax, kept)
    assert_same(dict(first.tensors), dict(second.tensors))


def test_what_encode_refuses_encode_from_refuses_too() -> None:
    q = streaming().at(SITE)
    x = bursts(4)
    x[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^layers\.3\.key\.pre_rope: 1 of 48 values"):
        q.encode_from(x, q.start)
    with pytest.raises(MismatchError, match=r"^layers\.3\.key\.pre_rope: .*12 channels"):
        q.encode_from(bursts(4, 5), q.start)
    with pytest.raises(MismatchError, match=r"the state has shape \(5,\), this quantizer has 12 groups"):
        q.encode_from(bursts(4), StreamingState(absmax=torch.ones(5), n_chunks=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8"),
        ({"bits": 4, "high_bits": 3}, "promoted channels: bits must be an integer from 4 to 8"),
        ({"high_bits": 16}, "promoted channels: bits must be an integer from 3 to 8"),
        ({"chunk_tokens": 1}, "chunk_tokens must be at least 2; got 1"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\); got 1.0"),
        ({"decay": float("nan")}, "decay must be in"),
        ({"groups": 5}, "groups must divide the 12 channels.*got 5. Nearest that does: 4"),
        ({"groups": -1}, "groups must divide"),
        ({"outlier_threshold_relative": 1.0}, "outlier_threshold_relative must be a finite number above 1; got 1.0"),
        ({"outlier_threshold_relative": float("inf")}, "outlier_threshold_relative must be a finite number"),
        ({"outlier_threshold_abs": 0.0}, "outlier_threshold_abs must be a finite number above 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streaming(**options)


# The estimator


def test_nothing_is_fitted() -> None:
    estimator = StreamingEstimator(bits=3, chunk_tokens=64, decay=0.8, groups=4, outlier_threshold_relative=2)
    shape = SiteShape(site=SITE, heads=2, head_dim=8)
    fit = estimator.fit(SiteStatistics(shape, "basic"))
    expected = Streaming(channels=16, bits=3, chunk_tokens=64, decay=0.8, groups=4, outlier_threshold_relative=2.0)
    assert fit.quantizer.spec == estimator.dynamic(shape).spec == expected.spec
    assert fit.source == "exact statistics"


def test_without_detection_nothing_is_promoted() -> None:
    quantizer = StreamingEstimator(outlier_detection=False).dynamic(SiteShape(site=SITE, heads=2, head_dim=8))
    assert isinstance(quantizer, Streaming)
    assert quantizer.outlier_threshold_relative is None
    assert "promoted" not in quantizer.encode(bursts(4, 16)).tensors


def test_groups_that_do_not_divide_are_refused_before_anything_runs() -> None:
    shape = SiteShape(site=SITE, heads=2, head_dim=8)
    StreamingEstimator(groups=8).check(shape)
    with pytest.raises(ValueError, match="groups must divide the 16 channels"):
        StreamingEstimator(groups=5).check(shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 8, "high_bits": 4}, "at least the 8 bits of the others"),
        ({"outlier_threshold_relative": 1.0}, "greater than 1"),
        ({"outlier_threshold_relative": float("inf")}, "finite"),
        ({"outlier_detection": False, "outlier_threshold_abs": 2.0}, "promotes nothing without outlier_detection"),
        ({"decay": 0.5}, "2 times at decay 0.5; use outlier_threshold_relative below 2"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingEstimator(**options)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.6, 0.9])
def test_a_threshold_that_is_refused_could_indeed_never_be_exceeded(decay: float) -> None:
    """The largest growth there is, from next to nothing."""
    most = 1 / (1 - decay)
    x = torch.tensor([[1e-4, 1e-4], [1e-4, 1e-4], [100.0, 1e-4], [0.0, 0.0]])
    for threshold, promoted in ((1.001 * most, False), (0.999 * most, True)):
        if threshold > 1:
            q = streaming(channels=2, chunk_tokens=2, decay=decay, outlier_threshold_relative=threshold)
            assert mask(q, q.encode(x)).tolist() == [[False, False], [promoted, False]]


# The seed's option names

README = {
    "chunk_size": 512,
    "ema_decay": 0.9,
    "attention_sink_size": 4,
    "key_bits_normal": 4,
    "value_bits_normal": 4,
    "key_bits_sink_outlier": 8,
    "value_bits_sink_outlier": 8,
    "outlier_threshold_relative": 3.0,
}


def test_the_example_of_the_seeds_readme_is_the_default() -> None:
    recipe = Recipe.parse(compression_config(**README), "streaming")
    assert recipe == Recipe.parse(compression_config(), "streaming")
    assert recipe.key == recipe.value == StreamingEstimator()
    assert (recipe.name, recipe.stage, recipe.sink_tokens) == ("streaming", "pre_rope", 4)


@pytest.mark.parametrize(
    ("name", "value", "key", "of_value"),
    [
        ("chunk_size", 64, {"chunk_tokens": 64}, {"chunk_tokens": 64}),
        ("ema_decay", 0.95, {"decay": 0.95}, {"decay": 0.95}),
        ("key_bits_normal", 3, {"bits": 3}, {}),
        ("value_bits_normal", 2, {}, {"bits": 2}),
        ("key_bits_sink_outlier", 6, {"high_bits": 6}, {}),
        ("value_bits_sink_outlier", 5, {}, {"high_bits": 5}),
        ("outlier_threshold_relative", 2.5, {"outlier_threshold_relative": 2.5}, {"outlier_threshold_relative": 2.5}),
        ("outlier_threshold_abs", 9.0, {"outlier_threshold_abs": 9.0}, {"outlier_threshold_abs": 9.0}),
        ("outlier_threshold_abs", None, {}, {}),
        ("outlier_detection_enabled", False, {"outlier_detection": False}, {"outlier_detection": False}),
        ("value_quant_groups", 8, {}, {"groups": 8}),
        ("key_quant_per_channel", True, {}, {}),
        ("enable_mixed_precision_cache", True, {}, {}),
        ("adaptive_chunk_size", False, {}, {}),
        ("periodic_stat_reset", False, {}, {}),
    ],
)
def test_every_option_reaches_its_place(
    name: str, value: object, key: dict[str, Any], of_value: dict[str, Any]
) -> None:
    recipe = Recipe.parse(compression_config(**{name: value}), "streaming")
    assert recipe.key == StreamingEstimator(**key)
    assert recipe.value == StreamingEstimator(**of_value)


def test_sinks_and_stage_are_the_recipes() -> None:
    recipe = compression_config(attention_sink_size=0, quantize_pre_rope=False)
    assert (recipe["sink_tokens"], recipe["stage"]) == (0, "post_rope")


def test_sixteen_bits_keep_a_tensor_exact() -> None:
    recipe = Recipe.parse(compression_config(key_bits_normal=16, key_bits_sink_outlier=16), "streaming")
    assert recipe.key.method == "identity"
    assert recipe.value == StreamingEstimator()


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"chunk_sizes": 64}, ["chunk_sizes: unknown option; did you mean chunk_size?"]),
        ({"colour": 1}, ["colour: unknown option; known: chunk_size, "]),
        ({"key_bits_normal": 1}, ["key_bits_normal: ", "got 1; from 2 to 8"]),
        ({"key_bits_normal": 16, "key_bits_sink_outlier": 8}, ["key_bits_normal: ", "promoted channels included"]),
        ({"value_bits_sink_outlier": 16}, ["value_bits_sink_outlier: ", "sink tokens always 16"]),
        ({"value_bits_normal": 8, "value_bits_sink_outlier": 4}, ["raise value_bits_sink_outlier"]),
        ({"outlier_detection_enabled": False, "outlier_threshold_abs": 2.0}, ["without outlier_detection_enabled"]),
        ({"outlier_threshold_relative": 0.5}, ["outlier_threshold_relative: ", "greater than 1; got 0.5"]),
        ({"attention_sink_size": 9}, ["attention_sink_size: expected an integer from 0 to 8; got 9"]),
        ({"quantize_pre_rope": 1}, ["quantize_pre_rope: expected true or false; got 1"]),
        ({"key_quant_per_channel": False}, ["key_quant_per_channel: must be true here", "method: uniform"]),
        ({"adaptive_chunk_size": True}, ["adaptive_chunk_size: must be false here"]),
        ({"verbose": False, "stat_reset_interval": 9}, ["verbose: has no meaning", "stat_reset_interval: has no"]),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^compression_config: ") as caught:
        compression_config(**options)
    for message in messages:
        assert str(caught.value).count(message) == 1
