"""Full precision against quantized, on the same windows."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.attention import AttentionLayer, attention_layers
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from artifacts.taps import evaluating
from simquant.policy import CachePolicy
from simquant.protocols import Protocol, ProtocolName
from simquant.report import protocol_line, stored_bits
from simquant.result import EvalResult
from simquant.simulate import own_policy
from simquant.steps import Steps
from simquant.usage import Usage

Normalization = Literal["targets", "gptq"]
Progress = Callable[[Iterable[Any]], Iterable[Any]]

_SCORED_LOGITS = 2**24
"""Logits that are scored at a time, to bound memory for large vocabularies."""


class NothingQuantizedError(ValueError):
    """A comparison was asked for in which nothing was quantized."""


@dataclass(frozen=True)
class Scores:
    """Per target: negative log probability under both models, divergence, and whether the first choices agree."""

    fp_nll: Float64[Tensor, "windows targets"]
    nll: Float64[Tensor, "windows targets"]
    kl: Float64[Tensor, "windows targets"]
    agrees: Bool[Tensor, "windows targets"]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    *,
    batch_size: int = 1,
    normalization: Normalization = "targets",
) -> float:
    """exp of the mean negative log probability of all tokens but the first of each window.

    Inside `simulate` this is the perplexity of the quantized model.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    windows : Int64[Tensor, "windows tokens"]
        Token ids, without padding.
    batch_size : int
        Windows per forward pass.
    normalization : {'targets', 'gptq'}
        Mean over all targets, or over the windows' means; the same for windows of equal length.
    """
    _check_windows(windows)
    with evaluating(model):
        nll = [_target_nll(_logits(model, batch), batch) for batch in windows.split(batch_size)]
    return _perplexity(torch.cat(nll), normalization)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    policy: CachePolicy | None = None,
    protocol: ProtocolName = "full",
    steps: Steps | None = None,
    batch_size: int = 1,
    normalization: Normalization = "targets",
    progress: Progress = iter,
) -> EvalResult:
    """What quantizing the cache costs.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    windows : Int64[Tensor, "windows tokens"]
        Token ids, without padding.
    quantizers : Artifact or mapping from Site to Quantizer
        See `simulate`.
    policy : CachePolicy or None
        Which tokens stay exact; None takes what the artifact says.
    protocol : {'full', 'decode', 'cache'}
        Every token quantized before it is read; each query sees what a cache holds at its step, in one pass; or step by
        step through a packed cache, the reference for 'decode'.
    steps : Steps or None
        How the text enters the cache under 'decode' and 'cache'; None is token by token.
    batch_size : int
        Windows per forward pass.
    normalization : {'targets', 'gptq'}
        See `perplexity`.
    progress : callable
        Wraps the batches, for a progress bar.

    Raises
    ------
    NothingQuantizedError
        If a quantizer has fewer than 16 bits and no token went through it.
    """
    [result] = evaluate_each(
        model,
        windows,
        [quantizers],
        policy=policy,
        protocol=protocol,
        steps=steps,
        batch_size=batch_size,
        normalization=normalization,
        progress=progress,
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
    steps: Steps | None = None,
    batch_size: int = 1,
    normalization: Normalization = "targets",
    progress: Progress = iter,
) -> list[EvalResult]:
    """What `evaluate` finds for each of several sets of quantizers, from one full-precision pass over the windows.

    Parameters
    ----------
    candidates : sequence of Artifact or of mappings from Site to Quantizer
        See `simulate`. The results are in their order.
    model, windows, policy, protocol, steps, batch_size, normalization, progress
        See `evaluate`.

    Raises
    ------
    NothingQuantizedError
        After the first batch, if a quantizer of a candidate has fewer than 16 bits and no token went through it.
    """
    _check_windows(windows)
    layers = attention_layers(model)
    runs = [
        _Run(
            quantizers,
            Protocol(name=protocol, policy=policy or own_policy(quantizers), steps=steps or Steps()),
            Usage(quantizers),
        )
        for quantizers in candidates
    ]
    with evaluating(model):
        for batch in progress(windows.split(batch_size)):
            start = time.perf_counter()
            fp = _logits(model, batch)
            fp_seconds = time.perf_counter() - start
            for run in runs:
                run.add(model, layers, batch, fp)
                run.seconds += fp_seconds
    return [run.result(windows, normalization) for run in runs]


def clustered_mean(differences: Float64[Tensor, "windows targets"]) -> tuple[float, float]:
    """Mean over all targets, and its standard error with windows as the independent units (nan for one window)."""
    n_windows = len(differences)
    mean = float(differences.mean())
    if n_windows < 2:
        return mean, float("nan")
    sums = (differences - mean).sum(dim=1)
    return mean, float((sums.square().sum() * n_windows / (n_windows - 1)).sqrt() / differences.numel())


@dataclass
class _Run:
    """One set of quantizers while the batches pass: their scores, what was stored, and the time spent."""

    quantizers: Artifact | Mapping[Site, Quantizer]
    protocol: Protocol
    usage: Usage
    scores: list[Scores] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, model: nn.Module, layers: Sequence[AttentionLayer], batch: Tensor, fp: Tensor) -> None:
        """Scores a batch whose full-precision logits are `fp`."""
        start = time.perf_counter()
        on_device = batch.to(next(model.parameters()).device)
        quantized, used = self.protocol.run(model, on_device, self.quantizers, layers, logits=_logits)
        self.usage.include(used)
        self.scores.append(_score(fp, quantized, batch))
        if self.usage.quantized_fraction == 0 and any(q.spec.bits < 16 for q in self.quantizers.values()):
            raise NothingQuantizedError(
                "evaluate: fewer than 16 bits were asked for and no token was quantized "
                f"({self.protocol.policy.describe()}, windows of {batch.shape[1]} tokens). "
                "Use longer windows or keep fewer tokens exact."
            )
        self.seconds += time.perf_counter() - start

    def result(self, windows: Tensor, normalization: Normalization) -> EvalResult:
        """The figures over all batches."""
        names = ("fp_nll", "nll", "kl", "agrees")
        scores = Scores(*(torch.cat([getattr(batch, name) for batch in self.scores]) for name in names))
        loss, stderr = clustered_mean(scores.nll - scores.fp_nll)
        return EvalResult(
            fp_perplexity=_perplexity(scores.fp_nll, normalization),
            perplexity=_perplexity(scores.nll, normalization),
            loss_nats=loss,
            loss_nats_stderr=stderr,
            kl_mean=float(scores.kl.mean()),
            kl_p999=float(np.quantile(scores.kl.numpy(), 0.999, method="higher")),  # defined for infinite values too
            top1_agreement=float(scores.agrees.double().mean()),
            bits=stored_bits(self.usage, self.protocol.policy),
            quantized_fraction=self.usage.quantized_fraction,
            protocol=protocol_line(self.quantizers, self.protocol, windows, normalization),
            n_targets=scores.nll.numel(),
            n_windows=len(windows),
            seconds=self.seconds,
        )


def _logits(model: nn.Module, batch: Int64[Tensor, "windows tokens"]) -> Float[Tensor, "windows tokens vocab"]:
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=batch.to(device), use_cache=False).logits
    return logits


def _score(fp: Tensor, quantized: Tensor, batch: Int64[Tensor, "windows tokens"]) -> Scores:
    targets = batch[:, 1:].to(fp.device).unsqueeze(-1)
    columns = max(1, _SCORED_LOGITS // (fp.shape[0] * fp.shape[2]))
    found = []
    for first in range(0, targets.shape[1], columns):
        part = slice(first, min(first + columns, targets.shape[1]))
        log_p, log_q = (logits[:, part].float().log_softmax(dim=-1) for logits in (fp, quantized))
        found.append(
            (
                -log_p.gather(-1, targets[:, part])[..., 0],
                -log_q.gather(-1, targets[:, part])[..., 0],
                _divergence(log_p, log_q),
                (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)),
            )
        )
    fp_nll, nll, kl, agrees = (torch.cat(columns, dim=1).cpu() for columns in zip(*found, strict=True))
    return Scores(fp_nll.double(), nll.double(), kl.double(), agrees)


def _divergence(
    log_p: Float[Tensor, "windows targets vocab"], log_q: Float[Tensor, "windows targets vocab"]
) -> Float[Tensor, "windows targets"]:
    """KL(p || q); a token that p rules out adds nothing, whatever q says."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p.isneginf(), 0.0).sum(dim=-1).clamp_min(0)


def _target_nll(logits: Tensor, batch: Int64[Tensor, "windows tokens"]) -> Float64[Tensor, "windows targets"]:
    return _score(logits, logits, batch).nll


def _perplexity(nll: Float64[Tensor, "windows targets"], normalization: Normalization) -> float:
    mean = nll.mean() if normalization == "targets" else nll.mean(dim=1).mean()
    return float(mean.exp())


def _check_windows(windows: Tensor) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows: expected at least one window of at least 2 tokens; got shape {tuple(windows.shape)}"
        )
