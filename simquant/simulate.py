"""Simulated quantization: attention reads every key and value after encoding and decoding (protocol 'full')."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.coding.finite import answered_each_step
from artifacts.errors import InvalidValueError
from artifacts.model.attention import AttentionLayer, attention_layers, hooked
from artifacts.model.layout import from_rows, to_rows
from artifacts.quantizer import Context, Quantizer
from artifacts.sites import Site
from simquant.cache.attention.tokens import Tokens, watch_tokens
from simquant.cache.store.decoded_sources import DecodedSources
from simquant.policy.checks import check_fit, default_policy
from simquant.policy.policy import CachePolicy
from simquant.usage import Usage, counted_passes


@contextmanager
def simulate(
    model: nn.Module,
    quantizers: Artifact | Mapping[Site, Quantizer],
    *,
    policy: CachePolicy | None = None,
    layers: Sequence[AttentionLayer] | None = None,
) -> Iterator[Usage]:
    """Context in which every key and value of the model is encoded and decoded before attention reads it.

    This is the protocol 'full': no query, its own token's included, reads a token in full precision, sinks excepted.
    The model is restored on exit, also after an exception.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    quantizers : Artifact or mapping from Site to Quantizer
        One for the keys and one for the values of every layer; `Identity` leaves a layer in full precision.
    policy : CachePolicy or None
        Number of sink tokens; None takes that of the artifact.
    layers : sequence of AttentionLayer or None
        Result of `attention_layers(model)`; None computes it. Required inside another simulation: finding the
        layers runs the model, and the outer quantizers would change and count those passes.

    Yields
    ------
    Usage
        Counts of tokens and stored bytes, updated while the model runs.

    Raises
    ------
    MismatchError
        If the artifact was made for another model, or covers only some layers.
    """
    layers = attention_layers(model) if layers is None else layers
    check_fit(model, quantizers, layers)
    policy = policy or default_policy(quantizers, sinks_alone=True)
    if not policy.encodes_at_once:
        raise InvalidValueError(
            "simulate: expected a policy with sinks alone, since every other token is quantized before it is read; got "
            f"{policy.describe()}. Use decode_exact or packed_cache (the protocols 'decode' and 'cache')."
        )
    usage, sources = Usage(quantizers), DecodedSources(quantizers)
    with ExitStack() as stack:
        stack.enter_context(answered_each_step(model))
        tokens = stack.enter_context(watch_tokens(layers))
        handlers = {
            site: _handler(site, quantizer, (policy, tokens, usage), sources) for site, quantizer in quantizers.items()
        }
        stack.enter_context(hooked(layers, handlers))
        stack.enter_context(counted_passes(model, usage))
        yield usage


def _handler(
    site: Site, quantizer: Quantizer, under: tuple[CachePolicy, Tokens, Usage], sources: DecodedSources
) -> Callable[[Tensor], Tensor]:
    on_device: dict[torch.device, Quantizer] = {}
    policy, tokens, usage = under

    def handle(x: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
        """Keys or values that attention reads in place of `x`."""
        # Only real tokens after the sinks (`keep`) are encoded; padding is neither encoded nor counted as kept.
        own = on_device.get(x.device) or on_device.setdefault(x.device, quantizer.to(x.device))
        rows = to_rows(x)
        keep = tokens.encoded(x.shape[0], x.shape[2], policy.sink_tokens)
        real = tokens.real(x.shape[0], x.shape[2])
        exact = None if keep is None else ~keep if real is None else real & ~keep
        n_exact = 0 if exact is None else int(exact.sum())
        usage.add_padding(site, 0 if real is None else int((~real).sum()))
        usage.add_exact(site, n_exact, n_exact * rows[:1].nbytes)
        context = sources.context(site, rows.device)
        parts = _parts(own, x.shape[0], x.shape[2], keep, rows.device)
        read = _read(own, rows, context, parts, (site, usage))
        sources.release(site)
        if sources.are_kept_of(site):
            sources.keep(site, _all_decoded(own, rows, read, context, exact))
        return from_rows(read, x)

    return handle


def _read(
    quantizer: Quantizer, rows: Tensor, context: Context, parts: list[Tensor] | None, counted: tuple[Site, Usage]
) -> Tensor:
    """Rows that attention reads: those in `parts` encoded and decoded, the others in full precision."""
    if parts is None:
        return _simulated(quantizer, rows, context, counted)
    read = rows.clone()
    for part in parts:
        read[part] = _simulated(quantizer, rows[part], tuple(u[part] for u in context), counted)
    return read


def _simulated(quantizer: Quantizer, rows: Tensor, context: Context, counted: tuple[Site, Usage]) -> Tensor:
    codes = quantizer.encode(rows, context)
    site, usage = counted
    usage.add(site, codes)
    return quantizer.decode(codes, context)


def _all_decoded(
    quantizer: Quantizer, rows: Tensor, read: Tensor, context: Context, exact: Bool[Tensor, "batch tokens"] | None
) -> Tensor:
    """Rows that later sites are predicted from: those of attention, with sinks encoded and decoded as well."""
    if exact is None or not exact.any():
        return read
    chosen, decoded = exact.flatten().to(rows.device), read.clone()
    decoded[chosen] = quantizer.simulate(rows[chosen], tuple(u[chosen] for u in context))
    return decoded


def _parts(
    quantizer: Quantizer, batch: int, n_tokens: int, keep: Bool[Tensor, "batch tokens"] | None, device: torch.device
) -> list[Tensor] | None:
    """Indices of rows that are encoded together: None for all, or per sequence if tokens share scales."""
    # Per-token scales allow one call for the whole batch. Shared scales must not mix sequences: a call for each.
    if quantizer.tokens_per_scale == 1 and keep is None:
        return None
    chosen = torch.ones(batch, n_tokens, dtype=torch.bool) if keep is None else keep
    index = torch.arange(batch * n_tokens).view(batch, n_tokens)
    rows = [index[chosen]] if quantizer.tokens_per_scale == 1 else [i[c] for i, c in zip(index, chosen, strict=True)]
    return [part.to(device) for part in rows if len(part)]
