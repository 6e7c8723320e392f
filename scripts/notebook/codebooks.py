"""Plots of artifacts, for notebooks and reports."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.sparse import AbstractSparse
from artifacts.sites import Site
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.token_histogram import OUTLIER_FRACTIONS


def plot_channel_ranges(statistics: ModelStatistics, site: Site, axes: Axes) -> None:
    """Plots minimum, 0.5 % and 99.5 % quantile and maximum of every channel of a site."""
    own = statistics.site(site, 0)
    low, high = own.histogram.quantiles(0.005)
    channels = np.arange(own.shape.channels)
    axes.vlines(
        channels, own.tails.minimum.cpu(), own.tails.maximum.cpu(), color="C0", alpha=0.35, label="minimum to maximum"
    )
    axes.vlines(channels, low.cpu(), high.cpu(), color="C0", linewidth=3, label="inner 99 %")
    for boundary in range(own.shape.head_dim, own.shape.channels, own.shape.head_dim):
        axes.axvline(boundary - 0.5, color="0.7", linewidth=0.6)
    axes.set(title=str(site), xlabel="channel (grey lines: heads)", ylabel="value")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_codebook(statistics: ModelStatistics, site: Site, quantizer: Quantizer, channel: int, axes: Axes) -> None:
    """Plots a site's levels over the histogram that they were fitted to: of one channel, or of normalised tokens."""
    inner = quantizer.inner if isinstance(quantizer, AbstractSparse) else quantizer
    own = statistics.site(site, 0)
    if isinstance(inner, Codebook):
        table = inner.levels[channel if len(inner.levels) > 1 else 0].float()
        levels = inner.offset[channel] + inner.scale[channel] * table
        centers, counts = own.histogram.centers()[channel], own.histogram.counts[channel]
        title, unit = f"{site}, channel {channel}", "value"
    elif isinstance(inner, DynamicCodebook):
        row = OUTLIER_FRACTIONS.index(getattr(quantizer, "outlier_fraction", 0.0))
        levels, centers, counts = (
            inner.levels[0].float(),
            own.token_histogram.centers(),
            own.token_histogram.counts[row],
        )
        title, unit = f"{site}, all tokens", "value within its token's range"
    else:
        raise ValueError(
            f"{site}: expected a codebook; got {quantizer.spec.describe()}. Use an artifact with method: codebook"
        )
    axes.hist(centers.cpu(), bins=120, weights=counts.cpu().double() / counts.sum().cpu(), color="C0", alpha=0.45)
    for level in levels:
        axes.axvline(float(level), color="C3", linewidth=1)
    seen = centers[counts > 0]
    axes.set(title=title, xlabel=f"{unit} (red: levels)", ylabel="share", xlim=(float(seen.min()), float(seen.max())))


def outlier_shares(quantizers: Mapping[Site, Quantizer], vectors: Mapping[Site, Tensor]) -> dict[Site, float]:
    """Share of outliers of each site, counted on `vectors`; 0 for quantizers without outliers."""
    return {
        site: float(quantizer.mask(vectors[site].float()).double().mean())
        if isinstance(quantizer, AbstractSparse)
        else 0.0
        for site, quantizer in quantizers.items()
    }


def plot_outlier_shares(shares: Mapping[Site, float], axes: Axes) -> None:
    """Plots outlier shares as bars, keys and values side by side for every layer."""
    for offset, tensor, color in ((-0.2, "key", "C0"), (0.2, "value", "C1")):
        chosen = {site.layer: share for site, share in shares.items() if site.tensor == tensor}
        axes.bar(
            np.array(list(chosen)) + offset, np.array(list(chosen.values())) * 100, width=0.4, color=color, label=tensor
        )
    axes.set(title="values stored as outliers", xlabel="layer", ylabel="share in %")
    axes.set_xticks(sorted({site.layer for site in shares}))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_reconstruction(x: Tensor, decoded: Tensor, title: str, figure: Figure) -> None:
    """Plots a site's vectors, the decoded ones, and the difference, as images of tokens by channels."""
    spread = float(x.abs().max())
    error = decoded - x
    panels: list[tuple[str, Tensor, float]] = [
        ("vectors", x, spread),
        ("decoded", decoded, spread),
        ("difference", error, float(error.abs().max()) or 1.0),
    ]
    for axes, (name, values, limit) in zip(np.ravel(figure.subplots(1, 3, sharey=True)), panels, strict=True):
        image = axes.imshow(
            values.float().cpu(), aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        axes.set(title=name, xlabel="channel")
        figure.colorbar(image, ax=axes, shrink=0.8)
    # Squared error over the variance about channel means, so that a constant offset of a channel counts as nothing.
    relative = float(error.square().sum() / (x - x.mean(dim=0)).square().sum())
    figure.suptitle(f"{title}: squared error {relative:.2%} of the variance")
    figure.axes[0].set_ylabel("token")
