"""Evaluation of quantized caches against full precision on the same windows: perplexity, KL divergence, bits."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.model.hooks import evaluating
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.evaluation.batch_scores import BatchScores, read_batches
from simquant.evaluation.evaluation_run import EvaluationRun, NothingQuantizedError
from simquant.evaluation.evaluation_settings import evaluation_settings
from simquant.evaluation.figures import Normalization, clustered_mean, perplexity_of
from simquant.evaluation.identity_check import check_identity
from simquant.evaluation.result import EvalResult
from simquant.evaluation.scored_targets import ScoredTargets, scored_targets
from simquant.evaluation.scoring import ScoredLogits, check_logits, window_logits
from simquant.evaluation.window_log import WindowLog
from simquant.policy.checks import check_coverage, default_policy
from simquant.policy.policy import CachePolicy
from simquant.protocols.chunking import Chunking
from simquant.protocols.protocol import Protocol, ProtocolName

__all__ = ["NothingQuantizedError", "clustered_mean", "evaluate", "evaluate_each", "perplexity"]

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    *,
    scored: ScoredTargets | None = None,
    batch_size: int = 1,
    normalization: Normalization = "targets",
) -> float:
    """Perplexity: exp of the mean negative log-likelihood of all tokens but the first of each window.

    Inside `simulate` this is the perplexity of the quantized model.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    windows : Int64[Tensor, "windows tokens"]
        Token ids, without padding.
    scored : ScoredTargets or None
        Targets that count, for overlapping windows; see `strided_windows`. None is all but the first of each window.
    batch_size : int
        Windows per forward pass.
    normalization : {'targets', 'gptq'}
        Mean over all targets, or mean of the windows' means as GPTQ computes it; equal for windows of equal length.

    Returns
    -------
    float
        Perplexity, from 1; a uniform guess has the size of the vocabulary.
    """
    scored = scored_targets(windows, scored, normalization)
    found: list[Tensor] = []
    with evaluating(model):
        for batch, n_scored in zip(windows.split(batch_size), scored.split(batch_size), strict=True):
            logits = ScoredLogits.of(window_logits(model, batch), batch, n_scored)
            for (nll,) in logits.by_window(logits.nll):
                check_logits("", len(found), nll)
                found.append(nll)
    return perplexity_of(found, normalization)[0]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    policy: CachePolicy | None = None,
    protocol: ProtocolName = "full",
    chunking: Chunking | None = None,
    scored: ScoredTargets | None = None,
    batch_size: int = 1,
    normalization: Normalization = "targets",
    progress: Progress = iter,
    log: WindowLog | None = None,
) -> EvalResult:
    """Loss of a quantized cache against full precision: perplexity, KL divergence, top-1 agreement, and stored bits.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    windows : Int64[Tensor, "windows tokens"]
        Token ids, without padding.
    quantizers : Artifact or mapping from Site to Quantizer
        See `simulate`.
    policy : CachePolicy or None
        Tokens kept in full precision; None takes the policy of the artifact and its recipe.
    protocol : {'full', 'decode', 'cache'}
        'full': every token is quantized before any query reads it. 'decode': one pass in which each query reads what
        a cache holds at its step. 'cache': step by step through a packed cache, the reference for 'decode'.
    chunking : Chunking or None
        Steps in which the text is read under 'decode' and 'cache'; None is token by token.
    scored : ScoredTargets or None
        Targets that count, for overlapping windows (see `strided_windows`); None is all but the first of each window.
    batch_size : int
        Windows per forward pass.
    normalization : {'targets', 'gptq'}
        See `perplexity`.
    progress : callable
        Wraps the batches, for a progress bar.
    log : WindowLog or None
        File of finished batches. Batches of an interrupted run of the same evaluation are not run again; the result is
        that of an uninterrupted run, their time included.

    Returns
    -------
    EvalResult
        Perplexity, loss in nats, KL and other figures with standard errors, and the bits that were stored.

    Raises
    ------
    NothingQuantizedError
        If a quantizer has fewer than 16 bits and encoded no token, or no scored target reads its codes.
    UnsupportedModelError
        If the protocol changes the model's logits with identity quantizers.
    NonFiniteError
        If the full-precision or the quantized model gives NaN; infinite losses are reported.
    WindowLogError
        If the log is one of another evaluation.
    """
    [result] = evaluate_each(
        model,
        windows,
        [quantizers],
        policy=policy,
        protocol=protocol,
        chunking=chunking,
        scored=scored,
        batch_size=batch_size,
        normalization=normalization,
        progress=progress,
        log=log,
    )
    return result


@torch.no_grad()
def evaluate_each(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    candidates: Sequence[Artifact | Mapping[Site, Quantizer]],
    *,
    policy: CachePolicy | None = None,
    protocol: ProtocolName = "full",
    chunking: Chunking | None = None,
    scored: ScoredTargets | None = None,
    batch_size: int = 1,
    normalization: Normalization = "targets",
    progress: Progress = iter,
    log: WindowLog | None = None,
) -> list[EvalResult]:
    """Results of `evaluate` for several sets of quantizers, with one full-precision pass over the windows for all.

    Parameters
    ----------
    candidates : sequence of Artifact or of mappings from Site to Quantizer
        See `simulate`; results are in the same order.
    model, windows, policy, protocol, chunking, scored, batch_size, normalization, progress, log
        See `evaluate`.

    Raises
    ------
    NothingQuantizedError
        If a quantizer of a candidate has fewer than 16 bits and no scored target reads its codes; after the first
        batch, if it encoded no token.
    UnsupportedModelError
        If the protocol changes the model's logits with identity quantizers.
    NonFiniteError
        If the full-precision or the quantized model gives NaN; infinite losses are reported.
    WindowLogError
        If the log is one of another evaluation.
    """
    scored = scored_targets(windows, scored, normalization)
    layers = attention_layers(model)
    policies = [policy or default_policy(own, sinks_alone=protocol == "full") for own in candidates]
    runs = [
        EvaluationRun(own, Protocol(name=protocol, policy=rules, chunking=chunking or Chunking()))
        for own, rules in zip(candidates, policies, strict=True)
    ]
    for run in runs:
        check_coverage(run.quantizers, layers)
        run.check(layers, windows.shape[1], max(scored.n_scored))
    batches = windows.split(batch_size)
    finished: list[list[BatchScores]] = []
    if log is not None:
        finished = read_batches(log, evaluation_settings(model, layers, runs, batches, scored), candidates)
    with evaluating(model):
        # The check is about the model and the protocol, not about quantizers: one set stands for all.
        for run in runs[:1]:
            check_identity(model, layers, run, windows[:1])
        for index, (batch, n_scored) in enumerate(zip(progress(batches), scored.split(batch_size), strict=True)):
            # Batches in the log are added without a forward pass; a new batch is appended before the next one starts.
            is_new = index >= len(finished)
            numbered = (index * batch_size, batch)
            found = _score(model, layers, runs, numbered, n_scored) if is_new else finished[index]
            for run, own in zip(runs, found, strict=True):
                run.add(own)
            if log is not None and is_new:
                log.append(index, [own.to_json() for own in found])
    return [run.result(model, windows, scored, normalization) for run in runs]


def _score(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    runs: Sequence[EvaluationRun],
    numbered: tuple[int, Int64[Tensor, "windows tokens"]],
    n_scored: Sequence[int],
) -> list[BatchScores]:
    """Scores of a batch under each set of quantizers, against one full-precision pass."""
    start = time.perf_counter()
    first, batch = numbered
    logits = runs[0].protocol.exact_logits(model, batch, logits=window_logits)
    fp = ScoredLogits.of(logits, batch, n_scored)
    for window, (nll,) in enumerate(fp.by_window(fp.nll), start=first):
        check_logits("full-precision", window, nll)  # so that a quantizer is not blamed for NaN
    seconds = time.perf_counter() - start
    found = [run.score(model, layers, batch, fp) for run in runs]
    return [replace(own, seconds=own.seconds + seconds) for own in found]
