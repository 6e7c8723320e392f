"""What each target costs under the exact and the quantized model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor, nn

_SCORED_LOGITS = 2**24
"""Logits that are scored at a time, to bound memory for large vocabularies."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The scored targets of a window, or of several one after the other.

    Parameters
    ----------
    fp_nll, nll : Float64[Tensor, "targets"]
        Negative log probability of the target under the exact and the quantized model, in nats.
    kl : Float64[Tensor, "targets"]
        KL(fp || quantized) of the whole distributions, in nats.
    agrees : Bool[Tensor, "targets"]
        Whether both models rank the same token first.
    """

    fp_nll: Float64[Tensor, " targets"]
    nll: Float64[Tensor, " targets"]
    kl: Float64[Tensor, " targets"]
    agrees: Bool[Tensor, " targets"]

    @property
    def loss(self) -> Float64[Tensor, " targets"]:
        """Rise of the negative log probability, in nats."""
        return self.nll - self.fp_nll

    @property
    def delta_p(self) -> Float64[Tensor, " targets"]:
        """Change of the target's probability, from -1 to 1."""
        return (-self.nll).exp() - (-self.fp_nll).exp()

    @staticmethod
    def cat(parts: Sequence["Scores"]) -> "Scores":
        """All targets, in order."""
        return Scores(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scores)))


def window_logits(model: nn.Module, batch: Int64[Tensor, "windows tokens"]) -> Float[Tensor, "windows tokens vocab"]:
    """The logits of whole windows, from one pass without a cache."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=batch.to(device), use_cache=False).logits
    return logits


def score(
    fp: Float[Tensor, "windows tokens vocab"],
    quantized: Float[Tensor, "windows tokens vocab"],
    batch: Int64[Tensor, "windows tokens"],
    n_scored: Sequence[int],
) -> list[Scores]:
    """The scores of each window of a batch.

    Parameters
    ----------
    fp, quantized : Float[Tensor, "windows tokens vocab"]
        Logits of both models.
    batch : Int64[Tensor, "windows tokens"]
        Token ids.
    n_scored : Sequence[int]
        How many of the last targets of each window are scored, from 1 to tokens - 1.
    """
    longest = max(n_scored)
    targets = batch[:, -longest:].to(fp.device).unsqueeze(-1)
    scored = (fp[:, -longest - 1 : -1], quantized[:, -longest - 1 : -1], targets)
    columns = max(1, _SCORED_LOGITS // (fp.shape[0] * fp.shape[2]))
    parts = [_compare(*part) for part in zip(*(x.split(columns, dim=1) for x in scored), strict=True)]
    found = [torch.cat(column, dim=1).cpu() for column in zip(*parts, strict=True)]
    return [Scores(*(column[row, longest - n :] for column in found)) for row, n in enumerate(n_scored)]


def _compare(
    fp: Float[Tensor, "windows targets vocab"],
    quantized: Float[Tensor, "windows targets vocab"],
    targets: Int64[Tensor, "windows targets 1"],
) -> tuple[Shaped[Tensor, "windows targets"], ...]:
    """The fields of `Scores`, of several windows."""
    log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (fp, quantized))
    fp_nll, nll = (-each.gather(-1, targets)[..., 0].double() for each in (log_p, log_q))
    return fp_nll, nll, _divergence(log_p, log_q), log_p.argmax(dim=-1) == log_q.argmax(dim=-1)


def _divergence(
    log_p: Float[Tensor, "windows targets vocab"], log_q: Float[Tensor, "windows targets vocab"]
) -> Float64[Tensor, "windows targets"]:
    """KL(p || q); a token that p rules out adds nothing, whatever q says."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p.isneginf(), 0.0).sum(dim=-1, dtype=torch.float64).clamp_min(0)
