"""Measures of `notebooks/decode_exact.ipynb`."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from artifacts.model.attention import AttentionLayer
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.evaluation.scoring import window_logits
from simquant.protocols.protocol import Protocol


@torch.no_grad()
def log_probabilities(
    model: nn.Module,
    ids: Int64[Tensor, "1 tokens"],
    quantizers: Mapping[Site, Quantizer] | None = None,
    protocol: Protocol | None = None,
    layers: Sequence[AttentionLayer] = (),
) -> Float[Tensor, " targets"]:
    """Log-likelihood of every token but the first, in full precision or under a protocol."""
    if quantizers is None or protocol is None:
        logits = window_logits(model, ids)
    else:
        logits, _ = protocol.run(model, ids, quantizers, layers, logits=window_logits)
    return logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]


def revised_shares(
    quantizer: Quantizer, x: Float[Tensor, "tokens channels"], n_first: int, lengths: Sequence[int]
) -> list[float]:
    """Share of the values of the first `n_first` tokens that decode differently when more tokens are encoded with them.

    A cache, which encodes a token once, needs a share of zero at every length.

    Examples
    --------
    >>> from artifacts.quantizers.dynamic_affine import DynamicAffine
    >>> x = torch.tensor([[0.0, 1.0], [0.5, 0.2], [0.7, 9.0]])
    >>> [revised_shares(DynamicAffine(channels=2, bits=2, per=per), x, 2, [2, 3]) for per in ("token", "channel")]
    [[0.0, 0.0], [0.0, 0.5]]
    """
    # A scale that spans all tokens of a call changes with later tokens, and with it the values of the first ones.
    alone = quantizer.simulate(x[:n_first])
    return [float((quantizer.simulate(x[:length])[:n_first] != alone).float().mean()) for length in lengths]
