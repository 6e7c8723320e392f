"""A model in float64: found, calibrated, run in all three ways, which then agree to rounding of float64, and stored."""

from pathlib import Path

import pytest
import torch
from helpers.models import random_llama

from artifacts.artifact import Artifact
from artifacts.model.attention import attention_layers
from artifacts.model.transformers_release import cache_argument
from calib import calibrate
from simquant import packed_cache, save_cache, simulate
from simquant.cache.saving.saved_cache import load_cache
from simquant.evaluate import evaluate
from simquant.protocols.decode import decode_exact

pytestmark = pytest.mark.shapes

IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(2))
MODEL = random_llama().double()
LAYERS = attention_layers(MODEL)


@pytest.fixture(scope="module", params=["default", "predictive"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    return calibrate(MODEL, torch.randint(3, 64, (3, 64), generator=torch.Generator().manual_seed(1)), request.param)


@torch.no_grad()
def test_three_ways_agree_to_the_rounding_of_float64(artifact: Artifact) -> None:
    exact = MODEL(IDS).logits
    with simulate(MODEL, artifact, layers=LAYERS):
        simulated = MODEL(IDS, use_cache=False).logits
    with decode_exact(MODEL, artifact, layers=LAYERS):
        decoded = MODEL(IDS, use_cache=False).logits
    with packed_cache(MODEL, artifact, layers=LAYERS) as new_cache:
        cache = new_cache()
        stepwise = [MODEL(part, **cache_argument(MODEL, cache), use_cache=True).logits for part in IDS.split(5, dim=1)]
    assert exact.dtype == simulated.dtype == decoded.dtype == torch.float64
    torch.testing.assert_close(decoded, simulated, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(stepwise, dim=1), simulated, rtol=0, atol=1e-12)
    assert not torch.allclose(simulated, exact, atol=1e-3)


@pytest.mark.parametrize("protocol", ["full", "decode", "cache"])
def test_it_is_evaluated(artifact: Artifact, protocol: str) -> None:
    found, full = (evaluate(MODEL, IDS[:, :10], artifact, protocol=p) for p in (protocol, "full"))
    assert found.kl_mean == pytest.approx(full.kl_mean, rel=1e-6)


@torch.no_grad()
def test_its_cache_is_stored_and_read_again(artifact: Artifact, tmp_path: Path) -> None:
    """What was written once, no reader took."""
    with packed_cache(MODEL, artifact, layers=LAYERS) as new_cache:
        cache, again = new_cache(), new_cache()
        MODEL(IDS[:, :16], **cache_argument(MODEL, cache), use_cache=True)
        save_cache(cache, tmp_path / "c.safetensors")
        load_cache(tmp_path / "c.safetensors", again)
        left, right = (MODEL(IDS[:, 16:], **cache_argument(MODEL, c), use_cache=True).logits for c in (cache, again))
    assert torch.equal(left, right)
