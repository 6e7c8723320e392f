"""Figures of single sites: the loss of each alone, and the share of values beyond its range."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.running.calibration_text import calibration_windows
from kvgauge.terminal.console import bar, say

if TYPE_CHECKING:
    from torch import Tensor

    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site
    from kvgauge.loading.models import LoadedModel
    from simquant.site_losses import SiteLoss

_SHOWN = 5


def site_figures(
    config: EvaluateConfig,
    loaded: "LoadedModel",
    quantizers: "Mapping[Site, Quantizer]",
    windows: "Tensor",
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Measures what the options ask for, and prints it unless JSON is wanted.

    Parameters
    ----------
    config : EvaluateConfig
        Its scoring, text, and `json` count.
    loaded : LoadedModel
        The model.
    quantizers : Artifact or mapping from Site to Quantizer
        What is evaluated.
    windows : Tensor
        The evaluated windows.
    settings : dict
        `policy`, `protocol` and `chunking` of the evaluation, as far as they are given.
    """
    found: dict[str, Any] = {}
    if config.scoring.site_losses is not None:
        found |= _losses(config, loaded, quantizers, windows[: config.scoring.site_losses], settings)
    if config.scoring.clipping:
        found |= _clipping(config, loaded, quantizers, windows, settings["policy"].sink_tokens)
    return found


def _losses(
    config: EvaluateConfig, loaded: "LoadedModel", quantizers: Any, windows: "Tensor", settings: dict[str, Any]
) -> dict[str, Any]:
    from simquant.evaluation.figures import error_text
    from simquant.site_losses import loss_shares, site_losses

    losses = site_losses(
        loaded.model,
        windows,
        quantizers,
        **settings,
        batch_size=config.scoring.batch_size,
        progress=lambda batches: bar(batches, "sites alone"),
    )
    # Each site's share of the sum of their losses; to first order the sum is the loss of all together.
    shares = loss_shares(losses)
    if not config.json:
        print(f"lost by each site alone, {len(windows)} windows:")
        for site in list(shares)[:_SHOWN]:
            loss = losses[site]
            lost = f"{loss.nats:+.5f} ± {error_text(loss.stderr, '.5f')} nats per token"
            print(f"  {site}: {lost}, {shares[site]:.0%} of their sum")
    return {"site_losses": {str(site): {**_json(losses[site]), "share": shares[site]} for site in losses}}


def _json(loss: "SiteLoss") -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(loss).items()}


def _clipping(
    config: EvaluateConfig, loaded: "LoadedModel", quantizers: Any, windows: "Tensor", sink_tokens: int
) -> dict[str, Any]:
    from artifacts.artifact import Artifact
    from simquant.evaluation.clipping import clipped_shares, drift_warning

    layers = loaded.layers()
    evaluated = clipped_shares(loaded.model, windows, quantizers, sink_tokens=sink_tokens, layers=layers)
    text = calibration_windows(config.text, loaded, quantizers) if isinstance(quantizers, Artifact) else None
    calibrated = (
        None if text is None else clipped_shares(loaded.model, text, quantizers, sink_tokens=sink_tokens, layers=layers)
    )
    if isinstance(quantizers, Artifact):
        warning = drift_warning(evaluated, calibrated, calibration_tokens=quantizers.manifest.corpus.n_tokens)
        if warning is not None:
            say(f"warning: {warning}")
    if not config.json:
        _show(evaluated, calibrated)
    known = calibrated or {}
    return {"clipped": {str(s): {"evaluation": x, "calibration": known.get(s)} for s, x in evaluated.items()}}


def _show(evaluated: "Mapping[Site, float]", calibrated: "Mapping[Site, float] | None") -> None:
    print("values beyond the fitted ranges:" if evaluated else "values beyond the fitted ranges: no range is static")
    for site in sorted(evaluated, key=lambda site: -evaluated[site])[:_SHOWN]:
        before = "unknown" if calibrated is None else f"{calibrated.get(site, 0.0):.3%}"
        print(f"  {site}: {evaluated[site]:.3%}, of the calibration text {before}")
