"""Values beyond fitted ranges, counted; and what is said of a text that has too many."""

import math

import pytest
import torch
from helpers.quantizers import every_quantizer, make, tokens
from helpers.sites import CHANNELS, everywhere, per_token
from torch import Tensor
from transformers import LlamaForCausalLM

from artifacts.model.attention import attention_layers, hooked
from artifacts.model.layout import to_rows
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.centred import Centred
from artifacts.quantizers.codebook import Codebook
from artifacts.quantizers.float8 import Float8
from artifacts.quantizers.hadamard import Hadamard
from artifacts.quantizers.mixed_codebook import MixedCodebook
from artifacts.quantizers.normalised import Normalised
from artifacts.quantizers.sparse import RankSparse, ThresholdSparse
from artifacts.sites import Site
from calib import calibrate
from calib.estimators.codebook_levels import fixed_levels
from simquant.evaluation.clipping import clipped_shares, drift_warning

pytestmark = pytest.mark.shapes

LOW, HIGH = -torch.linspace(0.5, 2, 8), torch.linspace(1, 4, 8)
X = 3 * torch.randn(500, 8, generator=torch.Generator().manual_seed(5))
for end in (LOW, HIGH, -HIGH):
    X[((X - end) / HIGH).abs() < 0.01] = 0  # so near the ends rounding may decide
OUTSIDE = (X < LOW) | (X > HIGH)
KEYS = Site(0, "key", "pre_rope")


def affine() -> Affine:
    return Affine(channels=8, bits=3, scale=(HIGH - LOW) / 7, offset=LOW)


def codebook(levels: Tensor) -> Codebook:
    return Codebook(channels=8, bits=2, scale=(HIGH - LOW) / 2, offset=(HIGH + LOW) / 2, levels=levels.half()[None])


def test_static_ranges_end_where_they_were_fitted() -> None:
    mixed = MixedCodebook(
        channels=8,
        bits=1.0,
        scale=(HIGH - LOW) / 2,
        offset=(HIGH + LOW) / 2,
        n_levels=torch.full((8,), 2, dtype=torch.int16),
        levels=torch.tensor([-0.5, 0.5] * 8).half(),
    )
    for quantizer in (affine(), codebook(torch.tensor([-0.9, -0.3, 0.3, 0.9])), mixed):
        assert torch.equal(quantizer.outside(X), OUTSIDE)
        assert not quantizer.outside(torch.stack([LOW, HIGH])).any()
    symmetric = Affine(channels=8, bits=3, scale=HIGH / 3)
    assert torch.equal(symmetric.outside(X), X.abs() > HIGH)
    float8 = Float8(channels=8, scale=HIGH / 448)
    assert torch.equal(float8.outside(X), X.abs() > HIGH)


def test_levels_in_deviations_reach_half_a_gap_further() -> None:
    levels = fixed_levels("gaussian", 4).float()
    end = float(levels[-1] + (levels[-1] - levels[-2]) / 2)
    unit = Codebook(channels=8, bits=2, scale=torch.ones(8), offset=torch.zeros(8), levels=levels.half()[None])
    draws = torch.randn(20000, 8)
    assert float(unit.outside(draws).double().mean()) == pytest.approx(math.erfc(end / math.sqrt(2)), abs=0.002)


def test_wrappers_look_at_what_their_quantizer_sees() -> None:
    mean = torch.linspace(-1, 1, 8)
    assert torch.equal(Centred(channels=8, inner=affine(), mean=mean).outside(X + mean), OUTSIDE)
    hadamard = Hadamard(channels=8, inner=affine(), group_size=8)
    assert torch.equal(hadamard.outside(X), affine().outside(hadamard.transform(X)))
    assert torch.equal(RankSparse(channels=8, inner=affine(), outliers_per_token=1).outside(X), OUTSIDE)
    normalised = Normalised(channels=8, inner=affine())
    rms = X.square().mean(dim=1, keepdim=True).sqrt()
    assert int((normalised.outside(X) != affine().outside(X / rms)).sum()) <= 2  # the norm is kept in 16 bits


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_quantizer_tells_of_each_token_alone(name: str, dtype: torch.dtype) -> None:
    quantizer, x = make(name), tokens(7, dtype=dtype)
    outside = quantizer.outside(x)
    if outside is not None:
        assert outside.shape == x.shape
        assert outside.dtype == torch.bool
        assert torch.equal(torch.cat([quantizer.outside(row[None]) for row in x]), outside)
        if "normalised" not in name:  # which has no size of its own
            assert quantizer.outside(1000 * x).float().mean() > max(0.5, float(outside.float().mean()))
        assert quantizer.outside(x[:0]).shape == (0, 24)


def test_thresholds_are_ranges_of_their_own() -> None:
    dynamic = ThresholdSparse(channels=8, inner=type(per_token())(channels=8, bits=4), lower=LOW, upper=HIGH)
    assert torch.equal(dynamic.outside(X), OUTSIDE)
    wide = ThresholdSparse(channels=8, inner=affine(), lower=2 * LOW, upper=2 * HIGH)
    assert torch.equal(wide.outside(X), OUTSIDE)
    assert type(per_token())(channels=8, bits=4).outside(X) is None


def ends(model: LlamaForCausalLM, windows: Tensor, sink_tokens: int) -> dict[Site, Quantizer]:
    """Quantizers whose ranges are the extremes of these windows."""
    seen: dict[Site, Tensor] = {}
    sites = list(everywhere(per_token))
    layers = attention_layers(model)
    with hooked(layers, {s: lambda x, s=s: seen.update({s: to_rows(x[:, :, sink_tokens:])}) for s in sites}):
        model(windows)
    found: dict[Site, Quantizer] = {}
    for site, x in seen.items():
        low, high = x.detach().aminmax(dim=0)
        found[site] = Affine(channels=CHANNELS, bits=4, scale=(high - low) / 15, offset=low)
    return found


def test_shares_are_counted_over_tokens_that_are_encoded(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(0, 64, (12, 20))
    quantizers = ends(tiny_llama, windows[:4], sink_tokens=2)
    assert set(clipped_shares(tiny_llama, windows[:4], quantizers, sink_tokens=2).values()) == {0.0}
    fresh = clipped_shares(tiny_llama, windows[4:], quantizers, sink_tokens=2)
    assert list(fresh) == list(quantizers)
    assert 0 < sum(fresh.values()) / 4 < 4 * 2 / (4 * 18 + 1)  # exchangeable values: 2 / (n + 1)
    tiny_llama.train()
    mixed = {**quantizers, KEYS: per_token()}
    assert list(clipped_shares(tiny_llama, windows, mixed)) == [site for site in mixed if site != KEYS]
    assert tiny_llama.training
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_outliers_of_an_artifact_are_what_it_was_told_to_leave_out(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(0, 64, (6, 64))
    artifact = calibrate(tiny_llama, windows, "kvquant-3-1pct")
    shares = clipped_shares(tiny_llama, windows, artifact)
    keys = [share for site, share in shares.items() if site.tensor == "key"]
    assert len(keys) == 2
    assert all(0.005 <= share <= 0.02 for share in keys)


@pytest.mark.parametrize(
    ("evaluated", "calibrated", "n_tokens", "warns"),
    [
        (0.0009, 0.0, 10**6, False),  # next to nothing
        (0.0011, 0.0, 10**6, True),
        (0.0011, 0.0, 1023, False),  # few tokens leave room beyond their extremes
        (0.02, 0.01, 10**6, False),
        (0.04, 0.01, 10**6, True),
        (0.05, None, 10**6, False),
        (0.2, None, 10**6, True),
    ],
)
def test_a_text_is_called_unlike_when_more_lies_outside_than_chance_explains(
    evaluated: float, calibrated: float | None, n_tokens: int, warns: bool
) -> None:
    before = None if calibrated is None else {KEYS: calibrated}
    warning = drift_warning({KEYS: evaluated, Site(0, "value"): 0.0}, before, calibration_tokens=n_tokens)
    assert (warning is not None) == warns


def test_the_warning_names_the_worst_site() -> None:
    shares = {KEYS: 0.01, Site(0, "value"): 0.3, Site(1, "value"): 0.0}
    warning = drift_warning(shares, {KEYS: 0.0}, calibration_tokens=10**6)
    assert warning is not None
    for phrase in ("30.00%", "layers.0.value", "calibration text it was 0.00%", "1 more of 3 sites"):
        assert phrase in warning
