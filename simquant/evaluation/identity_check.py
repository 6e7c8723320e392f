"""Check before an evaluation that a protocol with identity quantizers leaves the model's logits unchanged."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.errors import UnsupportedModelError
from artifacts.model.attention import AttentionLayer
from artifacts.quantizers.identity import Identity
from simquant.evaluation.evaluation_run import EvaluationRun
from simquant.evaluation.scoring import window_logits
from simquant.policy.policy import CachePolicy
from simquant.protocols.chunking import Chunking

_TOKENS = 8
_CHUNKING = Chunking(prefill_tokens=4)


def check_identity(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    run: EvaluationRun,
    windows: Int64[Tensor, "windows tokens"],
) -> None:
    """Check that logits under the protocol with identity quantizers equal those of the model, up to rounding.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    layers : Sequence[AttentionLayer]
        Attention layers of the model.
    run : EvaluationRun
        Protocol, and quantizers, of which only the sites are used. 'full' leaves attention to the model, so that there
        is nothing to check.
    windows : Int64[Tensor, "windows tokens"]
        Token ids; the first few are read.

    Raises
    ------
    UnsupportedModelError
        If the logits differ: the model's attention does something that a packed cache does not.
    """
    if run.protocol.name == "full":
        return
    few = windows[:, :_TOKENS]
    protocol = replace(run.protocol, policy=CachePolicy(), chunking=_CHUNKING)
    identities = {site: Identity(channels=own.channels, site=site) for site, own in run.quantizers.items()}
    exact = protocol.exact_logits(model, few, logits=window_logits)
    found, _ = protocol.run(model, few.to(exact.device), identities, layers, logits=window_logits)
    if exact.isnan().any() or found.isnan().any():
        return  # the evaluation reports the window
    log_p, log_q = (each.double().log_softmax(dim=-1) for each in (exact, found))
    kl = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).nansum(dim=-1)
    # The median over tokens: in a mixture of experts rounding may route a single token to another expert. Prefill and
    # decode steps apart: a fault may show only where a cache is filled, or only where it is read.
    filled = _CHUNKING.prefill_tokens
    median = max(float(part.median()) for part in (kl[:, :filled], kl[:, filled:]) if part.numel())
    explained = _rounding({exact.dtype, *(each.dtype for each in model.parameters() if each.is_floating_point())})
    if median > explained:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the protocol '{protocol.name}' changes its logits though nothing is quantized: "
            f"expected a median KL of at most {explained:.2g} nats, which rounding explains, in {few.shape[1]} tokens; "
            f"got {median:.2g}. Its attention does what a packed cache does not; use the protocol 'full'."
        )


def _rounding(dtypes: Iterable[torch.dtype]) -> float:
    """Largest KL in nats that rounding explains, for the coarsest dtype of the model."""
    # KL between two softmaxes whose logits differ by small errors d is half the variance of d (second-order expansion).
    # (16 eps)^2 is that for errors of sqrt(2) * 16, about 23, units in the last place of 1.
    return max(1e-6, (16 * max(torch.finfo(dtype).eps for dtype in dtypes)) ** 2)
