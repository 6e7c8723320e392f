"""Explanatory plots of single notebooks; plots of artifacts are in `scripts.notebook.codebooks`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

from artifacts.quantizer import Quantizer

_TOKENS = {"not read": "white", "read in full precision": "C0", "read decoded": "C1"}


def plot_levels(quantizers: Mapping[str, Quantizer], axes: Axes) -> None:
    """Plots decoded values over values from -1 to 1, all of one token, of quantizers with many channels."""
    for (name, quantizer), style in zip(quantizers.items(), ("-", "--", ":", "-."), strict=False):
        x = torch.linspace(-1, 1, quantizer.channels)
        axes.plot(x, quantizer.simulate(x[None])[0], style, label=name)
    axes.set(title="decoded values", xlabel="value", ylabel="decoded value", aspect="equal")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_errors_by_size(quantizers: Mapping[str, Quantizer], x: Float[Tensor, "tokens channels"], axes: Axes) -> None:
    """Plots the root mean square error of a site's values, by deciles of their magnitude."""
    order = x.abs().flatten().argsort()
    for (name, quantizer), marker in zip(quantizers.items(), "osD^", strict=False):
        error = (quantizer.simulate(x) - x).flatten()[order]
        parts = [float(part.square().mean().sqrt()) for part in error.tensor_split(10)]
        axes.plot(np.arange(5, 100, 10), parts, marker=marker, label=name)
    axes.set(
        title="error by magnitude", xlabel="values by magnitude, % (small to large)", ylabel="rms error", ylim=(0, None)
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_layer_errors(recipes: Sequence[Mapping[str, Any]], error: str, axes: Axes) -> None:
    """Plots relative squared errors of every layer, a row for each recipe of a comparison's `results.json`.

    Parameters
    ----------
    recipes : sequence of mappings
        Entries under `recipes`.
    error : {'logits', 'layer_output'}
        Error of the attention logits, which depend on keys alone, or of the attention output.
    axes : Axes
        Axes to draw on.
    """
    values = np.array([[site[error] for site in recipe["sites"].values() if "logits" in site] for recipe in recipes])
    image = axes.imshow(np.log10(values), aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(values):
        pale = np.log10(value) < np.mean(image.get_clim())
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", color="white" if pale else "black", fontsize=8)
    axes.set(title=error.replace("_", " "), xlabel="layer", xticks=range(values.shape[1]))
    axes.set_yticks(range(len(recipes)), [recipe["name"] for recipe in recipes])


def plot_tokens_read(decoded: Bool[Tensor, "queries tokens"], title: str, axes: Axes) -> None:
    """Plots the tokens (columns) that each query (row) reads in full precision and decoded."""
    visible = torch.ones_like(decoded).tril()
    what = (visible.int() + (visible & decoded).int()).numpy()
    axes.imshow(what, cmap=ListedColormap(list(_TOKENS.values())), vmin=0, vmax=2)
    axes.set(title=title, xlabel="token", ylabel="query")


def add_tokens_legend(axes: Axes) -> None:
    """Adds the legend of `plot_tokens_read`."""
    patches = [Patch(facecolor=color, edgecolor="0.5", label=name) for name, color in _TOKENS.items()]
    axes.legend(handles=patches, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_losses(
    exact: Float[Tensor, " targets"], quantized: Mapping[str, Float[Tensor, " targets"]], axes: Axes
) -> None:
    """Plots the cumulative loss in nats, target by target, of several protocols against full precision."""
    for (name, found), style in zip(quantized.items(), ("-", "-", "o"), strict=False):
        axes.plot((exact - found).cumsum(0), style, label=name, markersize=4, markerfacecolor="none")
    axes.axhline(0, color="0.3", linewidth=1, linestyle="--")
    axes.set(xlabel="token", ylabel="nats lost so far")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_revised_shares(shares: Mapping[str, Sequence[float]], lengths: Sequence[int], axes: Axes) -> None:
    """Plots the share of the first tokens' values that later tokens change; see `revised_shares`."""
    for (name, own), marker in zip(shares.items(), "osD^", strict=False):
        axes.plot(lengths, np.array(own) * 100, marker=marker, markersize=8, markerfacecolor="none", label=name)
    axes.set(xlabel="tokens encoded together", ylabel="values of the first tokens\nthat decode differently, %")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
