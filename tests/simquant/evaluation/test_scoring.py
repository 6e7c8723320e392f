"""Scores of logits: exact for real vocabularies, and in pieces."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from simquant.evaluation.scoring import ScoredLogits, Scores, score

pytestmark = pytest.mark.shapes

VOCABULARY = 2**18


def logits(n_tokens: int, vocab: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """Of two similar models, and the tokens."""
    generator = torch.Generator().manual_seed(0)
    fp = 3 * torch.randn(1, n_tokens, vocab, generator=generator)
    other = fp + 0.1 * torch.randn(fp.shape, generator=generator)
    return fp, other, torch.randint(vocab, (1, n_tokens), generator=generator)


def scores(fp: Tensor, quantized: Tensor, batch: Tensor) -> Scores:
    n_scored = [batch.shape[1] - 1]
    [found] = score(*(ScoredLogits.of(each, batch, n_scored) for each in (fp, quantized)))
    return found


@pytest.mark.parametrize("vocab", [50, 5000, VOCABULARY])
def test_scores_are_those_of_float64(vocab: int) -> None:
    """log_softmax in float32 was wrong by 2e-5 nats with 262,144 tokens."""
    fp, quantized, batch = logits(5, vocab)
    found = scores(fp, quantized, batch)
    log_p, log_q = (x[0, :-1].double().log_softmax(-1) for x in (fp, quantized))
    for nll, log in ((found.fp_nll, log_p), (found.nll, log_q)):
        torch.testing.assert_close(nll, -log.gather(1, batch[0, 1:, None])[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.kl, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=0, atol=1e-6)
    assert torch.equal(found.agrees, log_p.argmax(-1) == log_q.argmax(-1))


class Largest(TorchFunctionMode):
    """The largest tensor that is made and is no part of a given one."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self._given, self.numel = given.untyped_storage().data_ptr(), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() != self._given:
            self.numel = max(self.numel, found.numel())
        return found


def test_nothing_as_large_as_the_logits_is_made_of_them() -> None:
    fp, _, batch = logits(5)
    with Largest(fp) as largest:
        scores(fp, fp, batch)
    assert largest.numel <= VOCABULARY


@pytest.mark.parametrize(
    ("fp", "quantized", "kl"),
    [
        ([0.0, -math.inf, 0.0], [0.0, 0.0, 0.0], math.log(1.5)),
        ([0.0, -math.inf, 0.0], [1.0, -math.inf, 1.0], 0.0),
        ([0.0, -200.0, 0.0], [0.0, -math.inf, 0.0], 0.0),
        ([0.0, 0.0, 0.0], [0.0, -math.inf, 0.0], math.inf),
        ([0.0, math.nan, 0.0], [0.0, 0.0, 0.0], math.nan),
        ([0.0, 0.0, 0.0], [0.0, math.nan, 0.0], math.nan),
        ([0.0, 0.0, 0.0], [0.0, math.inf, 0.0], math.nan),
    ],
)
def test_a_token_that_the_exact_model_rules_out_adds_nothing(
    fp: list[float], quantized: list[float], kl: float
) -> None:
    found = scores(*(torch.tensor([[each, each]]) for each in (fp, quantized)), torch.zeros(1, 2, dtype=torch.int64))
    assert float(found.kl) == pytest.approx(kl, nan_ok=True)
