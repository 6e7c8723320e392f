"""Losses of single sites: as if each were quantized alone, and told apart."""

import math

import pytest
import torch
from helpers.sites import CHANNELS, everywhere, per_token
from transformers import LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.model.attention import attention_layers
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site
from calib import calibrate
from simquant import CachePolicy, evaluate
from simquant.site_losses import SiteLoss, loss_shares, site_losses

pytestmark = pytest.mark.shapes

WINDOWS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(3))
WORST = Site(1, "key", "pre_rope")


def test_each_site_is_quantized_alone(tiny_llama: LlamaForCausalLM) -> None:
    quantizers = everywhere(lambda: per_token(3))
    found = site_losses(tiny_llama, WINDOWS, quantizers, batch_size=2, policy=CachePolicy(sink_tokens=1))
    assert list(found) == list(quantizers)
    for site, loss in found.items():
        alone = {other: Identity(channels=CHANNELS) for other in quantizers} | {site: quantizers[site]}
        expected = evaluate(tiny_llama, WINDOWS, alone, batch_size=2, policy=CachePolicy(sink_tokens=1))
        assert loss == SiteLoss(nats=expected.loss_nats, stderr=expected.loss_nats_stderr, kl=expected.kl_mean)


def test_the_coarsest_site_stands_out(tiny_llama: LlamaForCausalLM) -> None:
    windows = tiny_llama.generate(WINDOWS[:, :2], do_sample=True, max_new_tokens=40, min_new_tokens=40, pad_token_id=0)
    found = site_losses(tiny_llama, windows, everywhere(lambda: per_token(8)) | {WORST: per_token(1)})
    assert max(found, key=lambda site: found[site].kl) == WORST
    assert found[WORST].kl > 0.9 * sum(loss.kl for loss in found.values())


def test_full_precision_runs_once_and_exact_sites_not_at_all(tiny_llama: LlamaForCausalLM) -> None:
    quantizers = everywhere(per_token) | {WORST: Identity(channels=CHANNELS)}
    runs: list[int] = []
    tiny_llama.register_forward_pre_hook(lambda *_: runs.append(1))
    attention_layers(tiny_llama)
    probes = len(runs)
    found = site_losses(tiny_llama, WINDOWS, quantizers, batch_size=2)
    assert len(runs) == 2 * probes + 2 * (1 + 3)
    assert found[WORST] == SiteLoss(nats=0.0, stderr=0.0, kl=0.0)


def test_an_artifact_keeps_its_sinks(tiny_llama: LlamaForCausalLM) -> None:
    artifact: Artifact = calibrate(tiny_llama, torch.randint(0, 64, (2, 32)), "kvquant-2-1pct-sink")
    assert artifact.manifest.sink_tokens == 1
    expected = site_losses(tiny_llama, WINDOWS, dict(artifact), policy=CachePolicy(sink_tokens=1))
    assert site_losses(tiny_llama, WINDOWS, artifact) == expected


def test_shares_add_up_and_gains_count_for_nothing() -> None:
    sites = list(everywhere(per_token))
    losses = {s: SiteLoss(nats=n, stderr=0.1, kl=0.1) for s, n in zip(sites, (0.1, -0.2, 0.6, 0.3), strict=True)}
    shares = loss_shares(losses)
    assert list(shares.values()) == pytest.approx([0.6, 0.3, 0.1, 0.0])
    assert list(shares) == [sites[2], sites[3], sites[0], sites[1]]
    assert set(loss_shares({s: SiteLoss(nats=-1.0, stderr=0.1, kl=0.1) for s in sites}).values()) == {0.0}


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_a_loss_without_bounds_ranks_first(worst: float) -> None:
    sites = list(everywhere(per_token))
    losses = {s: SiteLoss(nats=n, stderr=0.1, kl=0.1) for s, n in zip(sites, (0.1, 0.6, worst, -0.3), strict=True)}
    shares = loss_shares(losses)
    assert next(iter(shares)) == sites[2]
    assert list(shares.values()) == [1.0, 0.0, 0.0, 0.0]
    both = loss_shares({**losses, sites[0]: SiteLoss(nats=math.inf, stderr=0.1, kl=0.1)})
    assert (both[sites[0]], both[sites[2]]) == (0.5, 0.5)
