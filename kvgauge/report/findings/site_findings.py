"""Effects of quantization at each site: errors, losses, and values out of range or kept exact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from artifacts.artifact import Artifact
from artifacts.model.attention import AttentionLayer
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from kvgauge.report.findings.views import kept_mask, rows_of
from kvgauge.report.reported_run import ReportedRun
from kvgauge.terminal.console import bar
from simquant.evaluation.attention_inputs import AttentionInputs, attention_inputs
from simquant.evaluation.clipping import clipped_shares, drift_warning
from simquant.evaluation.site_errors import AttentionErrors, attention_errors
from simquant.site_losses import SiteLoss, loss_shares, site_losses

_ERRORS = ("logits", "key_output", "value_output", "output")
"""Of `AttentionErrors.relative`."""

FIRST_POSITIONS = 8
"""Positions at which sinks stand: so many are told one by one."""


@dataclass
class Seen:
    """Sums over windows that the exact model has read so far.

    Parameters
    ----------
    quantizers : mapping from Site to Quantizer
        Of the cache.
    sink_tokens : int
        First tokens of a window that stay in full precision.
    errors : dict from int to AttentionErrors
        By layer.
    norms : dict from Site to Tensor
        Sums over windows of the norm of each position.
    kept : dict from Site to Tensor
        Share of each channel's values that are kept beside the codes, summed over windows.
    """

    quantizers: Mapping[Site, Quantizer]
    sink_tokens: int
    errors: dict[int, AttentionErrors] = field(default_factory=dict)
    norms: dict[Site, Float64[Tensor, " tokens"]] = field(default_factory=dict)
    kept: dict[Site, Float64[Tensor, " channels"]] = field(default_factory=dict)
    n_windows: int = 0

    def add(self, window: Sequence[AttentionInputs]) -> None:
        """Takes in what all layers have read of one window."""
        self.n_windows += 1
        for inputs in window:
            index = inputs.layer.layer
            if not self._predicts(index):
                found = attention_errors(inputs, self.quantizers, sink_tokens=self.sink_tokens)
                self.errors[index] = self.errors.get(index, AttentionErrors()) + found
            # Sums by position and by channel; divided by the number of windows only where they are shown.
            for site, rows in rows_of(inputs, self.quantizers).items():
                self.norms[site] = self.norms.get(site, 0) + rows.double().norm(dim=1)
                mask = kept_mask(self.quantizers[site], rows[self.sink_tokens :])
                if mask is not None and len(mask):
                    self.kept[site] = self.kept.get(site, 0) + mask.double().mean(dim=0)

    def _predicts(self, layer: int) -> bool:
        """True where one of the layer's quantizers reads other sites, so that no layer stands alone."""
        return any(quantizer.sources for site, quantizer in self.quantizers.items() if site.layer == layer)


@torch.no_grad()
def look(run: ReportedRun, layers: Sequence[AttentionLayer]) -> Seen:
    """Reads the windows of a run, with one pass of the exact model for each."""
    quantizers = {site: quantizer.to(torch.device("cpu")) for site, quantizer in run.quantizers.items()}
    seen = Seen(quantizers, run.settings["policy"].sink_tokens)
    for window in bar(run.windows, "errors of layers"):
        seen.add(attention_inputs(run.loaded.model, layers, window))
    return seen


def site_rows(run: ReportedRun, layers: Sequence[AttentionLayer], seen: Seen) -> dict[str, dict[str, Any]]:
    """Everything that is known of each site."""
    losses = _losses(run)
    shares = loss_shares(losses)
    clipped = _clipped(run, layers, run.windows)
    calibrated = None if run.calibration_windows is None else _clipped(run, layers, run.calibration_windows)
    return {
        str(site): {
            "quantizer": quantizer.spec.describe(),
            "channels": quantizer.channels,
            "static_bytes": quantizer.static_bytes,
            "predicted": site.layer not in seen.errors,
            **_errors(site, seen.errors.get(site.layer)),
            **_loss(losses[site], shares[site]),
            "kept_fraction": float(seen.kept[site].mean()) / seen.n_windows if site in seen.kept else None,
            "clipped_fraction": clipped.get(site),
            "calibrated_clipped_fraction": None if calibrated is None else calibrated.get(site),
        }
        for site, quantizer in run.quantizers.items()
    }


def drift(run: ReportedRun, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """A warning about values beyond the fitted ranges, where there is reason for one."""
    if not isinstance(run.quantizers, Artifact):
        return None
    evaluated, calibrated = (
        {Site.parse(name): row[key] for name, row in rows.items() if row[key] is not None}
        for key in ("clipped_fraction", "calibrated_clipped_fraction")
    )
    n_tokens = run.quantizers.manifest.corpus.n_tokens
    known = None if run.calibration_windows is None else calibrated
    return drift_warning(evaluated, known, calibration_tokens=n_tokens)


def _losses(run: ReportedRun) -> dict[Site, SiteLoss]:
    settings = dict(run.settings)
    if settings.get("protocol") == "cache" and settings["policy"].eviction is None:
        settings["protocol"] = "decode"  # the same figures, in one pass
    return site_losses(
        run.loaded.model,
        run.windows,
        run.quantizers,
        **settings,
        progress=lambda batches: bar(batches, "losses of sites"),
    )


def _clipped(run: ReportedRun, layers: Sequence[AttentionLayer], windows: Tensor) -> dict[Site, float]:
    sinks = run.settings["policy"].sink_tokens
    return clipped_shares(run.loaded.model, windows, run.quantizers, sink_tokens=sinks, layers=layers)


def _errors(site: Site, errors: AttentionErrors | None) -> dict[str, float | None]:
    """Over the exact energies: logits, queries being the weights, and the attention output of the layer."""
    found: Mapping[str, float | None] = dict.fromkeys(_ERRORS) if errors is None else errors.relative()
    own = {"logit_error": found["logits"]} if site.tensor == "key" else {}
    return {**own, "output_error": found[f"{site.tensor}_output"], "layer_output_error": found["output"]}


def _loss(loss: SiteLoss, share: float) -> dict[str, float]:
    return {"loss_nats": loss.nats, "loss_nats_stderr": loss.stderr, "kl_mean": loss.kl, "loss_share": share}
