"""Values that are not finite: refused by name, and with one wait for a device that is not the CPU."""

import pytest
import torch
from helpers.models import random_llama
from torch import Tensor

from artifacts.coding import finite
from artifacts.errors import NonFiniteError
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.sites import Site
from simquant import packed_cache, simulate
from simquant.protocols.decode import decode_exact

pytestmark = pytest.mark.shapes

IDS = torch.arange(10)[None]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each wait fetches, as if tensors lay on a device that must be waited for."""
    found: list[int] = []
    answer = finite._answer

    def counted(asked: list) -> None:
        found.append(len(asked))
        answer(asked)

    monkeypatch.setattr(finite, "_must_be_waited_for", lambda x: True)
    monkeypatch.setattr(finite, "_answer", counted)
    return found


def quantizers() -> dict[Site, Quantizer]:
    sites = [site for layer in range(2) for site in (Site(layer, "key", "post_rope"), Site(layer, "value"))]
    return {site: DynamicAffine(channels=16, bits=4).at(site) for site in sites}


def test_a_call_waits_once(fetched: list[int]) -> None:
    """A dynamic range used to ask five times, each time for an answer of its own."""
    DynamicAffine(channels=8, bits=2).encode(torch.randn(5, 8))
    assert len(fetched) == 1
    assert fetched[0] > 1


@pytest.mark.parametrize("context", [simulate, packed_cache, decode_exact])
@torch.no_grad()
def test_a_step_of_a_model_waits_once(context, fetched: list[int]) -> None:
    model = random_llama()
    with context(model, quantizers()) as made:
        fetched.clear()
        for _ in range(2):
            model(IDS, **cache_argument(model, made())) if context is packed_cache else model(IDS, use_cache=False)
    assert len(fetched) == 2
    assert fetched[0] >= 4


def broken(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[2, 3] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_refused_wherever_it_lies(
    value: float, waits: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "_must_be_waited_for", lambda x: waits)
    with pytest.raises(NonFiniteError, match="1 of 40 values"):
        DynamicAffine(channels=8, bits=2).encode(broken(torch.randn(5, 8).to(dtype), value))


@torch.no_grad()
def test_a_step_names_the_site_and_the_next_step_starts_afresh(fetched: list[int]) -> None:
    model = random_llama()
    bias = model.model.layers[1].self_attn.v_proj
    with simulate(model, quantizers()):
        hook = bias.register_forward_hook(lambda *args: args[2] * torch.nan, prepend=True)
        with pytest.raises(NonFiniteError, match=r"^layers\.1\.value: 160 of 160 values"):
            model(IDS, use_cache=False)
        hook.remove()
        with pytest.raises(IndexError):
            model(IDS + 64, use_cache=False)
        assert model(IDS, use_cache=False).logits.isfinite().all()
    assert finite._PENDING.get() is None


def followed_by_an_error() -> None:
    with finite.answered_together():
        finite.expect_finite(torch.ones(3), torch.ones(3), lambda *_: NonFiniteError("one"))
        finite.expect_finite(torch.tensor([torch.nan]), torch.ones(3), lambda *_: NonFiniteError("two"))
        raise RuntimeError("a shape that follows")


def test_an_error_that_follows_is_explained(fetched: list[int]) -> None:
    with pytest.raises(NonFiniteError, match="two"):
        followed_by_an_error()
