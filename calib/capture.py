"""Capture of keys, values, queries and their gradients, by one forward (and backward) pass per batch of windows."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from artifacts.errors import UnsupportedModelError
from artifacts.model.attention import AttentionLayer, hooked
from artifacts.model.hooks import check_seen
from artifacts.model.layout import to_rows
from artifacts.sites import Site, Stage
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_shape import SiteShape
from calib.statistics.token_batch import TokenBatch
from calib.text.sketches import window_digests

Vectors = dict[Site, Float[Tensor, "_ _"]]

_NO_TARGET = -100
"""Target of tokens that the loss ignores."""


def site_shapes(layers: Sequence[AttentionLayer], stage: Stage) -> list[SiteShape]:
    """Shapes of every layer's keys and queries at one stage, and of its values."""
    shapes = []
    for layer in layers:
        common: dict[str, Any] = {"head_dim": layer.head_dim, "module": layer.name}
        pairs: dict[str, Any] = {
            "rotary_dim": layer.rotary_dim,
            "interleaved": layer.rotation == "interleaved",
            "frequencies": layer.frequencies,
        }
        key, query = Site(layer.layer, "key", stage), Site(layer.layer, "query", stage)
        shapes += [
            SiteShape(site=key, heads=layer.kv_heads, **common, **pairs),
            SiteShape(site=Site(layer.layer, "value"), heads=layer.kv_heads, **common),
            SiteShape(site=query, heads=layer.q_heads, **common, **pairs),
        ]
    return shapes


@torch.no_grad()
def capture(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    sites: Collection[Site],
    input_ids: Int64[Tensor, "windows tokens"],
    attention_mask: Bool[Tensor, "windows tokens"] | None = None,
) -> Vectors:
    """Vectors of each site during one forward pass, without padding, window by window.

    Parameters
    ----------
    model : nn.Module
        A transformers model; it is left unchanged, also after an error.
    layers : Sequence[AttentionLayer]
        Its attention layers.
    sites : Collection[Site]
        Sites to capture.
    input_ids : Int64[Tensor, "windows tokens"]
        Token ids.
    attention_mask : Bool[Tensor, "windows tokens"] or None
        False at padding, on either side; None where nothing is padded.
    """
    vectors: Vectors = {}

    def observer(site: Site) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            vectors[site] = _real_rows(x, attention_mask)

        return observe

    with hooked(layers, {site: observer(site) for site in sites}):
        _run(model, input_ids, attention_mask)
    check_seen(model, [site for site in sites if site not in vectors])
    return vectors


def capture_with_gradients(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    sites: Collection[Site],
    input_ids: Int64[Tensor, "windows tokens"],
    attention_mask: Bool[Tensor, "windows tokens"] | None = None,
) -> tuple[Vectors, Vectors]:
    """Vectors of each site, and gradients of the loss with respect to keys and values, by one backward pass more.

    The loss is the summed negative log-likelihood of all real tokens, so that every token has equal weight in windows
    of any length. The activations of all layers stay in memory until the end of the backward pass.

    Parameters
    ----------
    model, layers, sites, input_ids, attention_mask
        As in `capture`. The weights get no gradient.

    Raises
    ------
    UnsupportedModelError
        If the model returns no logits, or a module does not propagate gradients.

    References
    ----------
    arXiv:2401.18079, equation 7: the squared gradients weight the error of a key or value.
    """
    vectors: Vectors = {}
    sources: dict[Site, Tensor] = {}

    def watcher(site: Site) -> Callable[[Tensor], Tensor | None]:
        def watch(x: Tensor) -> Tensor | None:
            vectors[site] = _real_rows(x.detach(), attention_mask)
            if site.tensor == "query":
                return None
            # Weights need no gradient, so the graph starts at the first keys and values: make these leaves.
            sources[site] = x if x.requires_grad else x.detach().requires_grad_()
            return sources[site]

        return watch

    with _without_weight_gradients(model), torch.enable_grad():
        with hooked(layers, {site: watcher(site) for site in sites}), _gradients_watched(model):
            output = _run(model, input_ids, attention_mask)
        check_seen(model, [site for site in sites if site not in vectors])
        loss = _summed_loss(output, input_ids, attention_mask)
        found = _gradients(loss, sources)
    return vectors, {site: _real_rows(g, attention_mask) for site, g in found.items()}


@contextmanager
def _gradients_watched(model: nn.Module) -> Iterator[None]:
    """Raises inside the context for a leaf module, such as a linear layer, that drops the gradient of its input.

    The gradients of the remaining paths would be those of another model.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                stack.callback(module.register_forward_hook(_gradient_check(name)).remove)
        yield


def _gradient_check(name: str) -> Callable[[nn.Module, Any, Any], None]:
    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.requires_grad:
            return
        # Equal leading axes: a layer that maps each token. A router or a mask may well have an output without gradient.
        if any(isinstance(x, Tensor) and x.requires_grad and x.shape[:-1] == output.shape[:-1] for x in args):
            raise UnsupportedModelError(
                f"{name}: squared gradients need differentiable modules; {type(module).__name__} gives its input no "
                "gradient. Calibrate without --fisher, or load the weights unquantized."
            )

    return check


def _gradients(loss: Float[Tensor, ""], sources: dict[Site, Tensor]) -> dict[Site, Tensor]:
    found = torch.autograd.grad(loss, list(sources.values()), allow_unused=True) if loss.requires_grad else ()
    by_site = {site: g for site, g in zip(sources, found, strict=False) if g is not None}
    if len(by_site) < len(sources):
        raise UnsupportedModelError(
            f"{min(sources.keys() - by_site)}: squared gradients need a loss that depends on this site; autograd finds "
            "no path from the logits to it. Calibrate without --fisher."
        )
    return by_site


def _run(model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> Any:
    device = next(model.parameters()).device
    padding = {} if mask is None else _padding_arguments(mask.to(device, torch.int64))
    return model(input_ids=input_ids.to(device), use_cache=False, **padding)


def _real_rows(x: Float[Tensor, "batch heads tokens head_dim"], mask: Tensor | None) -> Float[Tensor, "_ _"]:
    rows = to_rows(x)
    return (rows if mask is None else rows[mask.reshape(-1).to(rows.device)]).clone()


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Turns off gradients of the weights inside the context, which saves their memory and time."""
    # Gradients at keys and values need the graph from there on only; those of weights would take as much memory as the
    # weights themselves.
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _summed_loss(output: Any, input_ids: Tensor, mask: Tensor | None) -> Float[Tensor, ""]:
    """Summed negative log-likelihood of each real token after a real one, in float32 or wider."""
    logits = getattr(output, "logits", None)
    if logits is None:
        raise UnsupportedModelError(
            f"calibrate: squared gradients need the logits of a causal language model; got {type(output).__name__} "
            "without any. Pass the model with its output head, or calibrate without --fisher."
        )
    targets = input_ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), _NO_TARGET)
    # The logits of position t predict token t + 1. In bfloat16 the log-sum-exp over a vocabulary loses the small terms.
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(
        wide.flatten(0, 1), targets.flatten().to(wide.device), reduction="sum", ignore_index=_NO_TARGET
    )


def collect(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    statistics: ModelStatistics,
    batches: Iterable[tuple[Int64[Tensor, "_ _"], Bool[Tensor, "_ _"] | None]],
) -> None:
    """Updates the statistics with batches of windows, each with its attention mask or None.

    After an error or an interrupt the statistics contain every batch before it, and nothing of it.

    Raises
    ------
    NonFiniteError
        If a vector or gradient has NaN or infinity; names site, window and count.
    """
    number = len(statistics.windows)
    for input_ids, mask in batches:
        batch = token_batch(input_ids, mask, number)
        arguments = (model, layers, statistics.sites, input_ids, mask)
        # Not bound to a name, which would keep these vectors in memory during the next forward pass.
        if statistics.fisher:
            statistics.update(batch, *capture_with_gradients(*arguments))
        else:
            statistics.update(batch, capture(*arguments))
        number += len(input_ids)


def _padding_arguments(mask: Int64[Tensor, "windows tokens"]) -> dict[str, Tensor]:
    """Attention mask, and positions that count real tokens only, so that left padding does not shift RoPE."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}


def token_batch(
    input_ids: Int64[Tensor, "windows tokens"], mask: Bool[Tensor, "windows tokens"] | None, first_window: int
) -> TokenBatch:
    """Positions and windows of the real tokens of a batch."""
    # Positions count real tokens only, so that they do not depend on the side or the amount of padding.
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    positions = (real.cumsum(dim=1) - 1)[real]
    windows = torch.arange(first_window, first_window + len(input_ids))[:, None].expand_as(input_ids)[real]
    digests = [window_digests(row[keep][None])[0] for row, keep in zip(input_ids, real, strict=True)]
    return TokenBatch(positions=positions, windows=windows, digests=digests)


def single_windows(windows: Int64[Tensor, "windows tokens"]) -> Iterator[tuple[Tensor, None]]:
    """Unpadded windows, one forward pass each."""
    for window in windows:
        yield window[None], None
