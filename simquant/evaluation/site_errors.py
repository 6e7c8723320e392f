"""Errors of attention logits and outputs of single quantized layers, on queries in full precision."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from artifacts.model.hooks import AttentionLayer
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.evaluation.attention_inputs import AttentionInputs

_LOGITS = 2**24
"""Attention logits in memory at a time, to bound memory for long windows."""


@dataclass(frozen=True, kw_only=True)
class AttentionErrors:
    """Squared errors of one layer, summed over queries, and the energies to divide them by; sums of windows add up.

    Parameters
    ----------
    logits, logit_energy : float
        (q . (k - k'))^2 over the keys that each query sees, and (q . k)^2 about the query's mean over these keys.
    key_output, value_output, output : float
        Squared distance from the attention output in full precision: with keys k' alone quantized, with values v'
        alone, with both.
    output_energy : float
        Squared norm of the output in full precision.
    """

    logits: float = 0.0
    logit_energy: float = 0.0
    key_output: float = 0.0
    value_output: float = 0.0
    output: float = 0.0
    output_energy: float = 0.0

    def __add__(self, other: "AttentionErrors") -> "AttentionErrors":
        return AttentionErrors(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def relative(self) -> dict[str, float]:
        """Relative errors: `logits`, `key_output`, `value_output` and `output` over their energies."""
        outputs = ("key_output", "value_output", "output")
        return {
            "logits": _ratio(self.logits, self.logit_energy),
            **{name: _ratio(getattr(self, name), self.output_energy) for name in outputs},
        }


@torch.no_grad()
def attention_errors(
    inputs: AttentionInputs, quantizers: Mapping[Site, Quantizer], *, sink_tokens: int = 0
) -> AttentionErrors:
    """Errors of one layer if it alone is quantized, all layers before it in full precision.

    Parameters
    ----------
    inputs : AttentionInputs
        Queries, keys and values of one layer and window.
    quantizers : Mapping[Site, Quantizer]
        Quantizers of the layer's keys, at either stage, and values; others are ignored.
    sink_tokens : int
        First tokens of the window in full precision.
    """
    layer = inputs.layer
    query = inputs.rotated(inputs.query)[0].float().unflatten(0, (layer.kv_heads, -1))
    cached = (inputs.rotated(inputs.key), inputs.value, *inputs.decoded(quantizers, sink_tokens))
    wide = [x.float().transpose(0, 1) for x in cached]  # [kv_heads, 1, tokens, head_dim], against groups of queries
    n_tokens = query.shape[2]
    # Causal: the queries of a block see no key beyond its end, so that later keys are cut off.
    block = max(1, _LOGITS // (layer.q_heads * n_tokens))
    found = AttentionErrors()
    for first in range(0, n_tokens, block):
        last = min(first + block, n_tokens)
        found += _errors(layer, query[:, :, first:last], [x[:, :, :last] for x in wide])
    return found


def _errors(
    layer: AttentionLayer,
    query: Float[Tensor, "kv_heads group queries head_dim"],
    cached: Sequence[Float[Tensor, "kv_heads 1 keys head_dim"]],
) -> AttentionErrors:
    """Errors of the last queries, over keys and values in full precision and decoded, none later than the queries."""
    key, value, stored_key, stored_value = cached
    visible = _visible(query.shape[2], key.shape[2], layer.sliding_window).to(query.device)
    logits, error = query @ key.mT, query @ (key - stored_key).mT
    # Logits are linear in the key: those of the stored keys are q k - q (k - k'), so that small errors are not lost in
    # the difference of two large logits.
    weights, stored_weights = (_weights(x, visible, layer) for x in (logits, logits - error))
    exact = weights @ value
    # Softmax ignores a constant added to a query's logits, so that their energy is taken about the query's mean.
    mean = (logits * visible).sum(dim=-1, keepdim=True) / visible.sum(dim=-1, keepdim=True)
    return AttentionErrors(
        logits=_energy(error * visible),
        logit_energy=_energy((logits - mean) * visible),
        key_output=_energy(stored_weights @ value - exact),
        value_output=_energy(weights @ stored_value - exact),
        output=_energy(stored_weights @ stored_value - exact),
        output_energy=_energy(exact),
    )


def _visible(n_queries: int, n_keys: int, sliding_window: int | None) -> Bool[Tensor, "queries keys"]:
    distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
    return (distance >= 0) & (distance < (sliding_window or n_keys))


def _weights(
    logits: Float[Tensor, "kv_heads group queries keys"], visible: Bool[Tensor, "queries keys"], layer: AttentionLayer
) -> Float[Tensor, "kv_heads group queries keys"]:
    """Attention weights with the layer's scale, softcap (Gemma 2) and sink logits (gpt-oss)."""
    module = layer.module
    logits = logits * getattr(module, "scaling", layer.head_dim**-0.5)
    cap = getattr(module, "attn_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~visible, -math.inf)
    sinks = getattr(module, "sinks", None)
    if sinks is None:
        return logits.softmax(dim=-1)
    drain = sinks.float().view(layer.kv_heads, -1, 1, 1).expand(-1, -1, logits.shape[2], 1)
    return torch.cat([logits, drain], dim=-1).softmax(dim=-1)[..., :-1]


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _ratio(error: float, energy: float) -> float:
    return error / energy if energy else math.inf if error else 0.0
