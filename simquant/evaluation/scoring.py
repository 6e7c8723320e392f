"""Scores of targets: negative log-likelihood in full precision and quantized, KL divergence, and top-1 agreement."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped
from torch import Tensor, nn

from artifacts.errors import NonFiniteError

_SCORED_LOGITS = 2**18
"""Logits scored at a time on a CPU: few enough to stay in its cache from one operation to the next."""

_SCORED_LOGITS_ELSEWHERE = 2**24

_SUMMED = 512
"""Terms summed in float32 before float64 takes over: several times faster, with errors no larger than a term's own."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of the targets of one window, or of several concatenated.

    Parameters
    ----------
    fp_nll, nll : Float64[Tensor, "targets"]
        Negative log-likelihood of the target in full precision and quantized, in nats.
    kl : Float64[Tensor, "targets"]
        KL(fp || quantized) of the distributions over the vocabulary, in nats.
    agrees : Bool[Tensor, "targets"]
        True if both models rank the same token first.
    """

    fp_nll: Float64[Tensor, " targets"]
    nll: Float64[Tensor, " targets"]
    kl: Float64[Tensor, " targets"]
    agrees: Bool[Tensor, " targets"]

    @property
    def loss(self) -> Float64[Tensor, " targets"]:
        """Increase of the negative log-likelihood, in nats."""
        return self.nll - self.fp_nll

    @property
    def delta_p(self) -> Float64[Tensor, " targets"]:
        """Change of the target's probability, from -1 to 1."""
        return (-self.nll).exp() - (-self.fp_nll).exp()

    @staticmethod
    def cat(parts: Sequence["Scores"]) -> "Scores":
        """Concatenated scores."""
        return Scores(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scores)))


def window_logits(model: nn.Module, batch: Int64[Tensor, "windows tokens"]) -> Float[Tensor, "windows tokens vocab"]:
    """Logits of whole windows, from one forward pass without a cache."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=batch.to(device), use_cache=False).logits
    return logits


def check_logits(which: str, window: int, nll: Float64[Tensor, " targets"]) -> None:
    """Check that a window has no NaN; a NaN among the logits of a token makes its target's log-likelihood NaN.

    Parameters
    ----------
    which : str
        Name of the model for the error; empty if there is only one.
    window : int
        Number of the window, from 0.
    nll : Float64[Tensor, "targets"]
        Negative log-likelihoods of its scored targets; infinity is allowed.

    Raises
    ------
    NonFiniteError
        If any is NaN.
    """
    n_bad, who = int(nll.isnan().sum()), f"the {which} model" if which else "the model"
    if n_bad:
        raise NonFiniteError(
            f"window {window}: {who} gives NaN for {n_bad} of {len(nll)} scored targets. Use a wider dtype (--dtype "
            "float32), or look for weights that are not finite."
        )


@dataclass(frozen=True, eq=False)
class ScoredLogits:
    """Logits of the scored targets of a batch, with their argmax and log-sum-exp.

    Parameters
    ----------
    logits : Float[Tensor, "windows targets vocab"]
        Logits that predict each target, in the dtype of the model; a view.
    targets : Int64[Tensor, "windows targets"]
        Token ids.
    n_scored : Sequence[int]
        Scored targets at the end of each window.
    first : Int64[Tensor, "windows targets"]
        Argmax of the logits; ties give the smallest token id.
    log_total : Float64[Tensor, "windows targets"]
        Log-sum-exp of the logits.
    """

    logits: Float[Tensor, "windows targets vocab"]
    targets: Int64[Tensor, "windows targets"]
    n_scored: Sequence[int]
    first: Int64[Tensor, "windows targets"]
    log_total: Float64[Tensor, "windows targets"]

    @staticmethod
    def of(
        logits: Float[Tensor, "windows tokens vocab"], batch: Int64[Tensor, "windows tokens"], n_scored: Sequence[int]
    ) -> "ScoredLogits":
        """Scored part of the logits of whole windows.

        Parameters
        ----------
        logits : Float[Tensor, "windows tokens vocab"]
            Logits of a model.
        batch : Int64[Tensor, "windows tokens"]
            Token ids.
        n_scored : Sequence[int]
            Scored targets at the end of each window, from 1 to tokens - 1.
        """
        # The logits at position t predict token t + 1: the last `longest` targets need those from one position earlier.
        longest = max(n_scored)
        scored = logits[:, -longest - 1 : -1]
        first, log_total = (torch.cat(column, dim=1) for column in zip(*map(_totals, _parts(scored)), strict=True))
        return ScoredLogits(scored, batch[:, -longest:].to(logits.device), n_scored, first, log_total)

    @property
    def nll(self) -> Float64[Tensor, "windows targets"]:
        """Negative log-likelihood of each target, in nats."""
        return self.log_total - self.logits.gather(-1, self.targets[..., None])[..., 0].double()

    def by_window(self, *columns: Shaped[Tensor, "windows targets"]) -> list[tuple[Tensor, ...]]:
        """Scored targets of some columns, window by window, on the CPU."""
        found = [column.cpu() for column in columns]
        longest = self.targets.shape[1]
        return [tuple(column[row, longest - n :] for column in found) for row, n in enumerate(self.n_scored)]


def score(fp: ScoredLogits, quantized: ScoredLogits) -> list[Scores]:
    """Scores of each window of a batch.

    Parameters
    ----------
    fp, quantized : ScoredLogits
        Logits of both models for the same targets.
    """
    # KL(p || q) = sum p (log p - log q) = sum p (a - b) - lse(a) + lse(b), with logits a and b. The log-sum-exps are
    # there for the likelihoods already, so that no log-probabilities over the vocabulary are made. Sums end in float64:
    # a small KL is the difference of large terms. Rounding below zero is cut off, as KL cannot be negative.
    pairs = zip(_parts(fp.logits), _parts(quantized.logits), strict=True)
    excess = torch.cat([_weighted_difference(*pair) for pair in pairs], dim=1)
    kl = (excess - fp.log_total + quantized.log_total).clamp_min(0)
    columns = fp.by_window(fp.nll, quantized.nll, kl, fp.first == quantized.first)
    return [Scores(*column) for column in columns]


def _parts(logits: Float[Tensor, "windows targets vocab"]) -> tuple[Float[Tensor, "windows _ vocab"], ...]:
    """Logits of a few targets at a time, so that temporary tensors are small."""
    at_a_time = _SCORED_LOGITS if logits.device.type == "cpu" else _SCORED_LOGITS_ELSEWHERE
    parts: tuple[Tensor, ...] = logits.split(max(1, at_a_time // (logits.shape[0] * logits.shape[2])), dim=1)
    return parts


def _totals(
    logits: Float[Tensor, "windows targets vocab"],
) -> tuple[Int64[Tensor, "windows targets"], Float64[Tensor, "windows targets"]]:
    """Argmax, and log-sum-exp in float64."""
    # log-sum-exp = max + log sum exp(x - max): exponents of at most 0 do not overflow, and the largest term is 1.
    wide = logits.float()
    first = _first(wide)
    largest = wide.gather(-1, first[..., None])
    return first, largest[..., 0].double() + _sum((wide - largest).exp_()).log()


def _weighted_difference(
    fp: Float[Tensor, "windows targets vocab"], quantized: Float[Tensor, "windows targets vocab"]
) -> Float64[Tensor, "windows targets"]:
    """Sum of p (a - b) over the vocabulary, with p = softmax(a): KL(p || q) without the log-sum-exps."""
    # A token with p = 0 adds nothing, whatever b is: 0 times infinity counts as 0, the limit of p log p. A true NaN
    # in a or b is not lost, since it is in their log-sum-exp as well.
    a, b = fp.float(), quantized.float()
    p = (a - a.amax(dim=-1, keepdim=True)).exp_()
    # p is left unnormalised: dividing the sum by sum p once costs less than normalising every term.
    terms = (a - b).mul_(p).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return _sum(terms) / _sum(p)


def _first(x: Float32[Tensor, "windows targets vocab"]) -> Int64[Tensor, "windows targets"]:
    """Argmax, the first of ties; by numpy on a CPU, where torch takes twenty times as long."""
    return torch.from_numpy(x.numpy().argmax(axis=-1)) if x.device.type == "cpu" else x.argmax(dim=-1)


def _sum(x: Float32[Tensor, "windows targets vocab"]) -> Float64[Tensor, "windows targets"]:
    # Blocks of 512 terms are summed in float32, the sums of blocks and the rest in float64.
    whole = x.shape[-1] // _SUMMED * _SUMMED
    blocks = x[..., :whole].unflatten(-1, (whole // _SUMMED, _SUMMED)).sum(dim=-1)
    total: Tensor = blocks.sum(dim=-1, dtype=torch.float64) + x[..., whole:].sum(dim=-1, dtype=torch.float64)
    return total
