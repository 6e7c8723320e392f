"""Pictures that single notebooks explain things with; those of artifacts are in `scripts.notebook.codebooks`."""

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

_TOKENS = {"not read": "white", "read exact": "C0", "read decoded": "C1"}


def plot_levels(quantizers: Mapping[str, Quantizer], axes: Axes) -> None:
    """What becomes of the values from -1 to 1, all of one token; the quantizers need many channels, and as many."""
    for (name, quantizer), style in zip(quantizers.items(), ("-", "--", ":", "-."), strict=False):
        x = torch.linspace(-1, 1, quantizer.channels)
        axes.plot(x, quantizer.simulate(x[None])[0], style, label=name)
    axes.set(title="what comes back", xlabel="value", ylabel="decoded value", aspect="equal")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_errors_by_size(quantizers: Mapping[str, Quantizer], x: Float[Tensor, "tokens channels"], axes: Axes) -> None:
    """Root mean square error of the values of a site, in ten classes of equal number from small to large magnitude."""
    order = x.abs().flatten().argsort()
    for (name, quantizer), marker in zip(quantizers.items(), "osD^", strict=False):
        error = (quantizer.simulate(x) - x).flatten()[order]
        parts = [float(part.square().mean().sqrt()) for part in error.tensor_split(10)]
        axes.plot(np.arange(5, 100, 10), parts, marker=marker, label=name)
    axes.set(
        title="where the error is", xlabel="values by magnitude, % (small to large)", ylabel="rms error", ylim=(0, None)
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_layer_errors(recipes: Sequence[Mapping[str, Any]], error: str, axes: Axes) -> None:
    """Relative squared errors of every layer: a row for each recipe of a comparison's `results.json`.

    Parameters
    ----------
    recipes : sequence of mappings
        The entries under `recipes`.
    error : {'logits', 'layer_output'}
        Of the attention logits, which keys alone change, or of the attention output.
    axes : Axes
        Where to draw.
    """
    values = np.array([[site[error] for site in recipe["sites"].values() if "logits" in site] for recipe in recipes])
    image = axes.imshow(np.log10(values), aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(values):
        pale = np.log10(value) < np.mean(image.get_clim())
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", color="white" if pale else "black", fontsize=8)
    axes.set(title=error.replace("_", " "), xlabel="layer", xticks=range(values.shape[1]))
    axes.set_yticks(range(len(recipes)), [recipe["name"] for recipe in recipes])


def plot_tokens_read(decoded: Bool[Tensor, "queries tokens"], title: str, axes: Axes) -> None:
    """Which tokens (columns) each query (row) reads exact, and which as the cache gives them back."""
    visible = torch.ones_like(decoded).tril()
    what = (visible.int() + (visible & decoded).int()).numpy()
    axes.imshow(what, cmap=ListedColormap(list(_TOKENS.values())), vmin=0, vmax=2)
    axes.set(title=title, xlabel="token", ylabel="query")


def add_tokens_legend(axes: Axes) -> None:
    """What the colours of `plot_tokens_read` mean."""
    patches = [Patch(facecolor=color, edgecolor="0.5", label=name) for name, color in _TOKENS.items()]
    axes.legend(handles=patches, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_losses(
    exact: Float[Tensor, " targets"], quantized: Mapping[str, Float[Tensor, " targets"]], axes: Axes
) -> None:
    """Nats lost so far, target by target: log probabilities of several protocols against those of the exact model."""
    for (name, found), style in zip(quantized.items(), ("-", "-", "o"), strict=False):
        axes.plot((exact - found).cumsum(0), style, label=name, markersize=4, markerfacecolor="none")
    axes.axhline(0, color="0.3", linewidth=1, linestyle="--")
    axes.set(xlabel="token", ylabel="nats lost so far")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def plot_revised_shares(shares: Mapping[str, Sequence[float]], lengths: Sequence[int], axes: Axes) -> None:
    """How much of the first tokens is read otherwise once later tokens have come; see `revised_shares`."""
    for (name, own), marker in zip(shares.items(), "osD^", strict=False):
        axes.plot(lengths, np.array(own) * 100, marker=marker, markersize=8, markerfacecolor="none", label=name)
    axes.set(xlabel="tokens encoded together", ylabel="values of the first tokens\nthat came back otherwise, %")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
