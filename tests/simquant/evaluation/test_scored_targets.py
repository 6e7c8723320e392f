"""Overlapping windows: against the loop that the documentation of transformers describes, under every protocol."""

import math

import pytest
import torch
from helpers.sites import everywhere, per_token
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from simquant import CachePolicy, Chunking, decode_exact, evaluate, perplexity, simulate
from simquant.evaluation.figures import clustered_mean
from simquant.evaluation.scored_targets import ScoredTargets, strided_windows
from simquant.evaluation.scoring import Scores

pytestmark = pytest.mark.shapes

TEXT = torch.randint(0, 64, (83,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def sliding_nll(model: nn.Module, text: Tensor, seqlen: int, stride: int) -> Tensor:
    """Every scored target's negative log probability, window by window; labels of the context are masked."""
    found, scored_to = [], 1
    for start in range(0, len(text) - seqlen + 1, stride):
        window = text[start : start + seqlen]
        log_p = model(window[None]).logits[0].double().log_softmax(-1)
        first = max(scored_to, start + 1)
        found += [-log_p[t - start - 1, text[t]] for t in range(first, start + seqlen)]
        scored_to = start + seqlen
    return torch.stack(found)


@pytest.mark.parametrize(("seqlen", "stride"), [(24, 8), (24, 1), (24, 23), (24, 24), (20, 13), (83, 83), (2, 1)])
def test_strided_perplexity_is_that_of_the_documented_loop(
    seqlen: int, stride: int, tiny_llama: LlamaForCausalLM
) -> None:
    nll = sliding_nll(tiny_llama, TEXT, seqlen, stride)
    windows, scored = strided_windows([TEXT], seqlen=seqlen, stride=stride)
    for batch_size in (1, 3):
        found = perplexity(tiny_llama, windows, scored=scored, batch_size=batch_size)
        assert found == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert sum(scored.n_scored) == len(nll)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"protocol": "decode", "policy": CachePolicy(residual_tokens=4)},
        {"protocol": "cache", "policy": CachePolicy(residual_tokens=4), "chunking": Chunking(prefill_tokens=24)},
    ],
    ids=["full", "decode", "cache"],
)
def test_every_protocol_scores_the_same_targets(settings: dict[str, object], tiny_llama: LlamaForCausalLM) -> None:
    quantizers = everywhere(per_token)
    windows, scored = strided_windows([TEXT], seqlen=24, stride=9)
    found = evaluate(tiny_llama, windows, quantizers, scored=scored, batch_size=2, **settings)
    policy, chunking = settings.get("policy"), settings.get("chunking", Chunking())
    context = (
        simulate(tiny_llama, quantizers)
        if policy is None
        else decode_exact(tiny_llama, quantizers, policy=policy, chunking=chunking)
    )
    with context:
        nll = sliding_nll(tiny_llama, TEXT, 24, 9)
    assert math.log(found.perplexity) == pytest.approx(float(nll.mean()), abs=1e-4)
    assert found.n_targets == len(nll) == 23 + 6 * 9
    assert found.n_windows == 7
    assert "each 9 tokens ahead of the last and scored on as many" in found.protocol


def test_every_target_of_every_document_is_scored_once() -> None:
    documents = [torch.arange(100, 117), torch.arange(5), torch.arange(200, 210)]
    windows, scored = strided_windows(documents, seqlen=10, stride=3)
    targets = [int(t) for window, n in zip(windows, scored.n_scored, strict=True) for t in window[-n:]]
    assert targets == [*range(101, 116), *range(201, 210)]  # the end that fills no stride is dropped
    assert scored.n_scored == (9, 3, 3, 9)
    some, few = strided_windows(documents, seqlen=10, stride=3, limit=2)
    assert torch.equal(some, windows[:2])
    assert few.n_scored == (9, 3)


def test_strided_windows_cluster_until_they_are_a_window_apart() -> None:
    windows, scored = strided_windows([TEXT], seqlen=24, stride=8)
    loss = [torch.randn(n, dtype=torch.float64) for n in scored.n_scored]
    scores = [Scores(torch.zeros_like(x), x, torch.zeros_like(x), x > 0) for x in loss]
    clusters = [cluster.loss for cluster in scored.clusters(scores, 24)]
    expected = [torch.cat(loss[first : first + 3]) for first in range(0, len(loss), 3)]
    assert clustered_mean(clusters) == clustered_mean(expected)
    assert len(clusters) == math.ceil(len(windows) / 3)
    assert scored.clusters(scores, 8)[0] is not scores[0]
    assert torch.equal(scored.clusters(scores, 8)[0].loss, loss[0])


@pytest.mark.parametrize(("window_tokens", "stride"), [(100, 40), (100, 60), (24, 7), (24, 8), (24, 24)])
def test_clusters_advance_by_a_window_at_least(window_tokens: int, stride: int) -> None:
    scored = ScoredTargets((stride,) * 12, stride)
    window = Scores(*torch.zeros(3, stride, dtype=torch.float64), torch.zeros(stride, dtype=torch.bool))
    first = scored.clusters([window] * 12, window_tokens)[0]
    assert window_tokens <= len(first.loss) < window_tokens + stride


def test_more_context_predicts_better(tiny_llama: LlamaForCausalLM) -> None:
    """On text that the model has written, which its own context makes likely."""
    text = tiny_llama.generate(torch.tensor([[1]]), do_sample=True, min_new_tokens=119, max_new_tokens=119)[0]
    side_by_side = perplexity(tiny_llama, text[:120].view(-1, 8))
    windows, scored = strided_windows([text], seqlen=64, stride=8)
    assert perplexity(tiny_llama, windows, scored=scored) < side_by_side


@pytest.mark.parametrize("changes", [{"seqlen": 1}, {"stride": 0}, {"stride": 25}, {"limit": 0}])
def test_impossible_numbers_are_refused(changes: dict[str, int]) -> None:
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=rf"strided windows: expected .* got .*{name}={value}"):
        strided_windows([TEXT], **{"seqlen": 24, "stride": 8, **changes})


def test_a_text_that_fills_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a document of at least 84 tokens; got none"):
        strided_windows([TEXT, TEXT], seqlen=84, stride=8)


def test_targets_of_other_windows_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    windows, scored = strided_windows([TEXT], seqlen=24, stride=9)
    with pytest.raises(ValueError, match=r"expected 3 numbers from 1 to 23.*got 7, from 9 to 23"):
        perplexity(tiny_llama, windows[:3], scored=scored)
    with pytest.raises(ValueError, match="from 0 to 0"):
        perplexity(tiny_llama, windows[:1], scored=ScoredTargets((0,)))
    with pytest.raises(ValueError, match=r"'gptq' averages windows .* stride of 9 tokens"):
        evaluate(tiny_llama, windows, everywhere(per_token), scored=scored, normalization="gptq")
