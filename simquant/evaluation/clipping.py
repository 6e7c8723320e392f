"""How much of a text lies beyond the ranges that calibration fitted: whether it is like the calibration text."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.model.attention import AttentionLayer, attention_layers, hooked
from artifacts.model.hooks import evaluating
from artifacts.model.layout import to_rows
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.evaluation.scoring import window_logits
from simquant.policy.checks import check_coverage, default_policy

_RISE = 3
"""How many times the expected share is no chance: windows are correlated, so that a share doubles now and then."""

_LEAST_SHARE = 0.001
"""Below it nothing is said: one value in a thousand costs less than the codes lose anyway."""

_LARGEST_UNKNOWN_SHARE = 0.1
"""Where the calibration text is not at hand: ten times the 1 % that recipes leave out on purpose."""


@torch.no_grad()
def clipped_shares(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    sink_tokens: int | None = None,
    layers: Sequence[AttentionLayer] | None = None,
) -> dict[Site, float]:
    """By site, the share of the exact model's values that lie beyond the range that its quantizer was fitted with.

    Values beyond it saturate, or are kept beside the codes and cost bits (`ThresholdSparse`). Sites without a static
    range are left out.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model; it is as it was afterwards.
    windows : Int64[Tensor, "windows tokens"]
        Token ids, without padding; each is one pass.
    quantizers : Artifact or mapping from Site to Quantizer
        See `simulate`.
    sink_tokens : int or None
        First tokens of each window that stay exact and are not counted; None takes what the artifact says.
    layers : sequence of AttentionLayer or None
        From `attention_layers(model)`, if they are known already.
    """
    layers = attention_layers(model) if layers is None else layers
    check_coverage(quantizers, layers)
    first = default_policy(quantizers, sinks_alone=True).sink_tokens if sink_tokens is None else sink_tokens
    counts: dict[Site, list[int]] = {}
    handlers = {site: _counter(site, quantizer, first, counts) for site, quantizer in quantizers.items()}
    with evaluating(model), hooked(layers, handlers):
        for window in windows:
            window_logits(model, window[None])
    return {site: counts[site][0] / counts[site][1] for site in quantizers if site in counts}


def drift_warning(
    evaluated: Mapping[Site, float], calibrated: Mapping[Site, float] | None, *, calibration_tokens: int
) -> str | None:
    """What to tell about a text whose values leave the fitted ranges too often; None where they do not.

    A new value lies beyond the smallest and the largest of n like it with probability 2 / (n + 1), whatever their
    distribution: so many are expected beside those that lay outside in the calibration text already.

    Parameters
    ----------
    evaluated, calibrated : mapping from Site to float
        `clipped_shares` of the evaluated and of the calibration text, None where the latter is not at hand.
    calibration_tokens : int
        How many tokens the ranges were fitted to.
    """
    chance = 2 / (calibration_tokens + 1)
    drifted = {site: share for site, share in evaluated.items() if share > _limit(site, calibrated, chance)}
    if not drifted:
        return None
    worst = max(drifted, key=lambda site: drifted[site])
    before = "" if calibrated is None else f"; of the calibration text it was {calibrated.get(worst, 0.0):.2%}"
    others = f", and too much at {len(drifted) - 1} more of {len(evaluated)} sites" if len(drifted) > 1 else ""
    return (
        f"{drifted[worst]:.2%} of the values at {worst} lie beyond the range that calibration fitted{before}{others}. "
        "The text is unlike the calibration text: calibrate on text like it"
    )


def _limit(site: Site, calibrated: Mapping[Site, float] | None, chance: float) -> float:
    if calibrated is None:
        return max(_LARGEST_UNKNOWN_SHARE, _RISE * chance)
    return max(_LEAST_SHARE, _RISE * (calibrated.get(site, 0.0) + chance))


def _counter(site: Site, quantizer: Quantizer, first: int, counts: dict[Site, list[int]]) -> Callable[[Tensor], None]:
    def count(x: Float[Tensor, "batch heads tokens head_dim"]) -> None:
        """Adds the values outside, and all values."""
        outside = quantizer.to(x.device).outside(to_rows(x[:, :, first:]))
        if outside is not None and outside.numel():
            own = counts.setdefault(site, [0, 0])
            own[0] += int(outside.sum())
            own[1] += outside.numel()

    return count
