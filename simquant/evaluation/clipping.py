"""Share of clipped values: a check that a text resembles the calibration text."""

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
"""Multiple of the expected share that gives a warning: windows are correlated, so that a share may double by chance."""

_LEAST_SHARE = 0.001
"""Smallest share that gives a warning: one clipped value in a thousand costs less than rounding does."""

_LARGEST_UNKNOWN_SHARE = 0.1
"""Limit without the calibration text: ten times the 1 % that recipes leave out of the range on purpose."""


@torch.no_grad()
def clipped_shares(
    model: nn.Module,
    windows: Int64[Tensor, "windows tokens"],
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    sink_tokens: int | None = None,
    layers: Sequence[AttentionLayer] | None = None,
) -> dict[Site, float]:
    """Share of values outside of the calibrated range, for each site with a static range.

    Values come from the model in full precision. Outside of the range they saturate, or are stored as outliers and cost
    bits (`ThresholdSparse`).

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model; restored afterwards.
    windows : Int64[Tensor, "windows tokens"]
        Token ids, without padding; each window is one forward pass.
    quantizers : Artifact or mapping from Site to Quantizer
        See `simulate`.
    sink_tokens : int or None
        First tokens of each window, not counted; None takes the number of the artifact.
    layers : sequence of AttentionLayer or None
        Result of `attention_layers(model)`; None computes it.
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
    """Warning about a text whose values leave the calibrated ranges too often; None if they do not.

    Parameters
    ----------
    evaluated, calibrated : mapping from Site to float
        Results of `clipped_shares` for the evaluated and for the calibration text; None without the latter.
    calibration_tokens : int
        Number of tokens that the ranges were fitted to.
    """
    # A new value is below the minimum or above the maximum of n exchangeable ones with probability 2 / (n + 1), for any
    # continuous distribution: each of the n + 1 is as likely the largest. That share is expected by chance alone, in
    # addition to the share that the fit already left outside.
    chance = 2 / (calibration_tokens + 1)
    drifted = {site: share for site, share in evaluated.items() if share > _limit(site, calibrated, chance)}
    if not drifted:
        return None
    worst = max(drifted, key=lambda site: drifted[site])
    before = "" if calibrated is None else f"; of the calibration text it was {calibrated.get(worst, 0.0):.2%}"
    others = f", and too much at {len(drifted) - 1} more of {len(evaluated)} sites" if len(drifted) > 1 else ""
    return (
        f"{drifted[worst]:.2%} of the values at {worst} lie outside of the calibrated range{before}{others}. The text "
        "is unlike the calibration text: calibrate on text like it"
    )


def _limit(site: Site, calibrated: Mapping[Site, float] | None, chance: float) -> float:
    # Without the calibration text the share that the fit left outside is unknown: allow ten times what recipes ask for.
    if calibrated is None:
        return max(_LARGEST_UNKNOWN_SHARE, _RISE * chance)
    return max(_LEAST_SHARE, _RISE * (calibrated.get(site, 0.0) + chance))


def _counter(site: Site, quantizer: Quantizer, first: int, counts: dict[Site, list[int]]) -> Callable[[Tensor], None]:
    def count(x: Float[Tensor, "batch heads tokens head_dim"]) -> None:
        """Counts the values outside of the range, and all values."""
        outside = quantizer.to(x.device).outside(to_rows(x[:, :, first:]))
        if outside is not None and outside.numel():
            own = counts.setdefault(site, [0, 0])
            own[0] += int(outside.sum())
            own[1] += outside.numel()

    return count
