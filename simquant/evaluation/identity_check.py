"""A check on a few tokens, before an evaluation starts: where nothing is quantized, a protocol changes nothing."""

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
    """The logits of identities are those of the model, by the protocol and at the sites of a run, up to rounding.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    layers : Sequence[AttentionLayer]
        Its attention layers.
    run : EvaluationRun
        Quantizers, which are not used but for their sites, and the protocol. 'full' leaves attention to the model, so
        that there is nothing to check.
    windows : Int64[Tensor, "windows tokens"]
        Token ids; the first few are read.

    Raises
    ------
    UnsupportedModelError
        If they differ: the model does something with its keys and values that a packed cache does not.
    """
    if run.protocol.name == "full":
        return
    few = windows[:, :_TOKENS]
    protocol = replace(run.protocol, policy=CachePolicy(), chunking=_CHUNKING)
    identities = {site: Identity(channels=own.channels, site=site) for site, own in run.quantizers.items()}
    exact = protocol.exact_logits(model, few, logits=window_logits)
    found, _ = protocol.run(model, few.to(exact.device), identities, layers, logits=window_logits)
    if exact.isnan().any() or found.isnan().any():
        return  # the evaluation itself says where
    log_p, log_q = (each.double().log_softmax(dim=-1) for each in (exact, found))
    kl = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).nansum(dim=-1)
    # The median: rounding sends a token to another expert now and then, which changes that token alone.
    # Of each step's kind apart: a fault may show where a cache is filled, or where it is read.
    filled = _CHUNKING.prefill_tokens
    median = max(float(part.median()) for part in (kl[:, :filled], kl[:, filled:]) if part.numel())
    explained = _rounding({exact.dtype, *(each.dtype for each in model.parameters() if each.is_floating_point())})
    if median > explained:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the protocol '{protocol.name}' changes its logits though nothing is quantized: "
            f"KL {median:.2g} nats in the median of {few.shape[1]} tokens, where rounding explains {explained:.2g}. "
            "Its attention does what a packed cache does not; use the protocol 'full'."
        )


def _rounding(dtypes: Iterable[torch.dtype]) -> float:
    """Nats that rounding explains: half the variance of logits that err by some 20 units in the last place of 1."""
    return max(1e-6, (16 * max(torch.finfo(dtype).eps for dtype in dtypes)) ** 2)
