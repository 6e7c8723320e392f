"""Measures and plots of `notebooks/predictive_coding.ipynb`."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float32, Float64
from matplotlib.axes import Axes
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.quantizers.mixed_codebook import MixedCodebook
from artifacts.quantizers.predicted import Predicted
from artifacts.quantizers.wrapper import AbstractWrapper
from artifacts.sites import Site
from simquant import EvalResult


def predictions(
    quantizers: Mapping[Site, Quantizer], vectors: Mapping[Site, Float[Tensor, "tokens _"]]
) -> dict[Site, Float32[Tensor, "tokens _"]]:
    """Prediction of each site that has sources, from its decoded sources."""
    decoded: dict[Site, Tensor] = {}
    predicted: dict[Site, Tensor] = {}
    for site in sorted(quantizers):
        quantizer = quantizers[site]
        context = tuple(decoded[source] for source in quantizer.sources)
        predictor = quantizer.inner if isinstance(quantizer, ExactSinks) else quantizer
        if isinstance(predictor, Predicted):
            predicted[site] = predictor.predict(context)
        decoded[site] = quantizer.simulate(vectors[site].float(), context)
    return predicted


def explained_variance(x: Float[Tensor, "tokens channels"], predicted: Float[Tensor, "tokens channels"]) -> float:
    """Share of the total variance of all channels that a prediction removes.

    Examples
    --------
    >>> x = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    >>> explained_variance(x, torch.zeros(2, 2)), explained_variance(x, x + 3)
    (0.0, 1.0)
    """
    return 1 - float((x - predicted).var(dim=0).sum() / x.var(dim=0).sum())


def component_variances(x: Float[Tensor, "tokens channels"], width: int) -> Float64[Tensor, " channels"]:
    """Variances in the eigenbasis of each group of `width` channels, the largest first; width 1 keeps the channels."""
    centred = (x - x.mean(dim=0)).double().unflatten(1, (-1, width)).transpose(0, 1)
    # Eigenvalues of each group's covariance are the variances of its principal components.
    variances: Tensor = torch.linalg.eigvalsh(centred.mT @ centred / len(x)).flatten()
    return variances.clamp_min(0).sort(descending=True).values


def least_bits(variances: Float64[Tensor, " components"], error: float) -> float:
    """Mean bits per component that a total squared error requires, for independent Gaussian components.

    References
    ----------
    Reverse water-filling: Cover and Thomas, Elements of Information Theory, section 10.3.3 (second edition).

    Examples
    --------
    >>> least_bits(torch.tensor([16.0, 1.0, 0.5], dtype=torch.float64), error=2.5)
    0.6666666666666666
    """
    # Components with variance above the level D are coded to the error D at log2(v / D) / 2 bits, the others are left
    # out and add their variance: D = (error - sum of the left out) / number of the coded, for the fewest left out with
    # which no coded variance is below D.
    rising = variances.sort().values
    left_out = torch.cat([rising.new_zeros(1), rising.cumsum(0)[:-1]])
    levels = (error - left_out) / torch.arange(len(rising), 0, -1)
    level = levels[levels <= rising][:1]
    return float((variances / level).log2().clamp_min(0).mean() / 2) if len(level) else 0.0


def plot_component_variances(variances: Mapping[str, Float64[Tensor, " components"]], share: float, axes: Axes) -> None:
    """Plots variances of one site's components, with the least bits for an error of `share` of the first ones' sum."""
    error = share * float(next(iter(variances.values())).sum())
    for (name, own), style in zip(variances.items(), (":", "--", "-.", "-"), strict=False):
        axes.plot(own, style, label=f"{name}: {least_bits(own, error):.2f} bits")
    axes.set(xlabel="component, from the largest variance on", ylabel="variance", yscale="log")
    axes.legend(frameon=False, title=f"least bits for an error of {share:.0%}")


def plot_level_bits(quantizers: Mapping[str, Quantizer], axes: Axes) -> None:
    """Plots bits of each component, log2 of its number of levels, in descending order, of a `MixedCodebook`."""
    for (name, quantizer), style in zip(quantizers.items(), (":", "--", "-"), strict=False):
        while isinstance(quantizer, AbstractWrapper):
            quantizer = quantizer.inner
        assert isinstance(quantizer, MixedCodebook)
        bits = quantizer.n_levels.double().log2().sort(descending=True).values
        axes.step(range(len(bits)), bits, style, where="mid", label=name)
    axes.set(xlabel="component, from the most bits on", ylabel="bits")
    axes.legend(frameon=False)


def plot_ladder(results: Mapping[str, EvalResult], axes: Axes) -> None:
    """Plots the KL of each recipe with its standard error, from top to bottom."""
    kl = [result.kl_mean for result in results.values()]
    axes.errorbar(kl, range(len(kl)), xerr=[result.kl_mean_stderr for result in results.values()], fmt="o", capsize=3)
    axes.set_yticks(range(len(kl)), list(results))
    axes.grid(color="0.92")
    axes.set(xscale="log", xlabel="KL(exact || quantized), nats per token", ylim=(len(kl) - 0.5, -0.5))


def plot_loss_over_bits(curves: Mapping[str, Sequence[EvalResult]], axes: Axes) -> None:
    """Plots KL over counted bits, a line for each kind of recipe."""
    for (name, results), marker in zip(curves.items(), "osD^", strict=False):
        bits = [float(result.bits["average"]) for result in results]
        kl, errors = zip(*((result.kl_mean, result.kl_mean_stderr) for result in results), strict=True)
        axes.errorbar(bits, kl, yerr=errors, marker=marker, capsize=3, label=name)
    axes.grid(color="0.92")
    axes.set(yscale="log", xlabel="counted bits per key or value channel", ylabel="KL, nats per token")
    axes.legend(frameon=False)


def results_table(results: Mapping[str, EvalResult], base: str) -> str:
    """Markdown table of counted bits, losses, and loss beyond `base` on the same windows, with standard errors."""
    lines = [f"| recipe | bits | KL | nats | beyond: {base} |", "|---|---:|---:|---:|---:|"]
    for name, result in results.items():
        more, error = result.loss_beyond(results[base])
        beyond = "" if name == base else f"{more:+.4f} ± {error:.4f}"
        cells = [name, f"{result.bits['average']:.2f}", f"{result.kl_mean:.4f} ± {result.kl_mean_stderr:.4f}"]
        cells += [f"{result.loss_nats:.4f} ± {result.loss_nats_stderr:.4f}", beyond]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def costs_table(artifacts: Mapping[str, Mapping[Site, Quantizer]], results: Mapping[str, EvalResult]) -> str:
    """Markdown table of storage and arithmetic costs of recipes.

    Pays from: tokens from which codes and static bytes together are below 16 bits per channel. History: tokens whose
    decoding takes as many multiply-adds as a decode step in the model's linear layers.
    """
    lines = ["| recipe | kB stored once | over the weights | pays from | multiply-adds to decode a token | history |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, quantizers in artifacts.items():
        costs = results[name].costs
        n_bytes = sum(quantizer.static_bytes for quantizer in quantizers.values())
        saved_bits = 16 * sum(quantizer.channels for quantizer in quantizers.values()) - costs.bits_per_token
        cells = [name, f"{n_bytes / 1000:.0f}", f"{costs.static_share:.1%}"]
        cells += [f"{math.ceil(8 * n_bytes / saved_bits)} tokens", f"{costs.decode_multiply_adds:,}"]
        cells += [f"{1 / costs.decode_share:,.0f} tokens"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
