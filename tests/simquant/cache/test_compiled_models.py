"""Models that are compiled already: hooks that are added later have to be called all the same."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.caches import step
from helpers.models import IDS, logits
from helpers.sites import everywhere, per_token
from torch import nn
from transformers import LlamaForCausalLM

from artifacts.errors import UnsupportedModelError
from artifacts.model.attention import attention_layers
from calib import calibrate
from calib.capture import capture
from simquant import decode_exact, packed_cache, simulate

pytestmark = pytest.mark.shapes


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def its_layers(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def its_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


every_way = pytest.mark.parametrize("way", [in_place, its_layers, its_forward, wrapped])


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@every_way
def test_a_compiled_model_is_simulated_and_calibrated_as_any_other(
    way: Callable[[nn.Module], nn.Module], tiny_llama: LlamaForCausalLM
) -> None:
    """After one call the perplexity was the exact one, and 0.0 bits were stored; calibration found no projection."""
    quantizers = everywhere(per_token)

    def figures(model: nn.Module) -> dict[str, Any]:
        layers = attention_layers(model)
        with simulate(model, quantizers, layers=layers) as usage:
            simulated = logits(model)
        with decode_exact(model, quantizers, layers=layers):
            decoded = logits(model)
        with packed_cache(model, quantizers, layers=layers) as new_cache:
            stepwise = step(model, new_cache(), IDS)
        return {
            "names": [layer.name for layer in layers],
            "logits": [simulated, decoded, stepwise],
            "bits": usage.bits("key"),
            "artifact": calibrate(model, IDS, "kvquant").digest,
        }

    expected = figures(tiny_llama)
    compiled = way(tiny_llama)
    exact = logits(compiled)
    found = figures(compiled)
    assert all(torch.equal(a, b) for a, b in zip(found.pop("logits"), expected.pop("logits"), strict=True))
    assert found == expected
    assert torch.equal(logits(compiled), exact)


def test_a_pass_that_goes_by_the_hooks_is_noticed(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a graph does that was captured earlier, whatever captured it."""
    layers, recorded = attention_layers(tiny_llama), tiny_llama(IDS, use_cache=False)
    monkeypatch.setattr(tiny_llama, "forward", lambda *args, **kwargs: recorded)
    for context in (simulate, decode_exact):
        with (
            context(tiny_llama, everywhere(per_token), layers=layers),
            pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: expected calls .*layers\.0\.key.*_orig_mod"),
        ):
            logits(tiny_llama)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: expected calls .*layers\.0\.key.*_orig_mod"):
        capture(tiny_llama, layers, everywhere(per_token), IDS)
