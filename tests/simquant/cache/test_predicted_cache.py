"""Sites that are predicted from others, in a packed cache and in one pass."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers.models import random_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.codes import Codes
from artifacts.errors import MismatchError
from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.model.transformers_release import cache_argument
from calib import calibrate
from simquant import CachePolicy, Chunking, PackedCache, ResidualWindow, packed_cache, simulate
from simquant.policy.eviction import Eviction
from simquant.protocols.decode import decode_exact

POLICY = CachePolicy(sink_tokens=2, residual_tokens=5)
AT_ONCE = CachePolicy(sink_tokens=2)
IDS = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_llama(num_hidden_layers=3)


@pytest.fixture
def layers(model: LlamaForCausalLM) -> tuple[AttentionLayer, ...]:
    return attention_layers(model)


@pytest.fixture
def double(model: LlamaForCausalLM, layers: Sequence[AttentionLayer]) -> Iterator[LlamaForCausalLM]:
    """The model in float64: in float32 rounding moves a value to another code now and then."""
    yield model.double()
    model.float()


@pytest.fixture(scope="module", params=["predictive", "predictive-lowrank"])
def artifact(request: pytest.FixtureRequest, model: LlamaForCausalLM) -> Artifact:
    windows = torch.randint(64, (8, 48), generator=torch.Generator().manual_seed(2))
    return calibrate(model, windows, recipe=request.param)


@torch.no_grad()
def logits(model: LlamaForCausalLM, cache: PackedCache, ids: Tensor, chunk: int = 1) -> Tensor:
    return torch.cat([model(part, **cache_argument(model, cache)).logits for part in ids.split(chunk, dim=1)], dim=1)


def codes_of(cache: PackedCache, row: int) -> list[Codes]:
    found = [store.codes() for layer in cache.layers for store in layer.store.sequences[row].stores()]
    return [codes for codes in found if codes is not None]


def assert_same(one: list[Codes], other: list[Codes]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for mine, others in zip(a.all_tensors(), b.all_tensors(), strict=True):
            assert torch.equal(mine, others)


@torch.no_grad()
def test_every_protocol_reads_the_same(model: LlamaForCausalLM, artifact: Artifact) -> None:
    ids = IDS[:, :20]
    with simulate(model, artifact, policy=AT_ONCE):
        full = model(ids).logits
    for policy, expected in ((AT_ONCE, full), (POLICY, None)):
        with decode_exact(model, artifact, policy=policy, chunking=Chunking()):
            decoded = model(ids).logits
        with packed_cache(model, artifact, policy=policy) as new_cache:
            stepwise = logits(model, new_cache(), ids)
        torch.testing.assert_close(stepwise, decoded, rtol=1e-4, atol=1e-4)
        if expected is not None:
            torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)
        else:
            assert (decoded - full).abs().max() > 1e-2, "a window changes what is read"


@pytest.mark.shapes
def test_codes_depend_neither_on_chunks_nor_on_the_batch(
    double: LlamaForCausalLM, layers: Sequence[AttentionLayer], artifact: Artifact
) -> None:
    with packed_cache(double, artifact, policy=AT_ONCE, layers=layers) as new_cache:
        caches = [new_cache() for _ in range(3)]
        for cache, ids, chunk in zip(caches, (IDS, IDS, IDS[1:]), (40, 3, 40), strict=True):
            logits(double, cache, ids, chunk)
    assert_same(codes_of(caches[0], 1), codes_of(caches[1], 1))
    assert_same(codes_of(caches[0], 1), codes_of(caches[2], 0))


def test_a_cropped_cache_goes_on(
    double: LlamaForCausalLM, layers: Sequence[AttentionLayer], artifact: Artifact
) -> None:
    with packed_cache(double, artifact, policy=AT_ONCE, layers=layers) as new_cache:
        cache, fresh = new_cache(), new_cache()
        logits(double, cache, IDS, 40)
        cache.crop(30)
        logits(double, fresh, IDS[:, :30], 30)
        both = [logits(double, own, IDS[:, 30:33]) for own in (cache, fresh)]
    torch.testing.assert_close(*both)


def test_what_is_decoded_for_others_is_let_go(model: LlamaForCausalLM, artifact: Artifact) -> None:
    with packed_cache(model, artifact, policy=POLICY) as new_cache:
        cache = new_cache()
        logits(model, cache, IDS, 40)
        size = cache.nbytes
        held: list[int] = []
        sources = cache.layers[0].store.sources
        hooks = [
            layer.mlp.register_forward_hook(lambda *_: held.append(len(sources._rows))) for layer in model.model.layers
        ]
        logits(model, cache, IDS[:, :1])
        for hook in hooks:
            hook.remove()
        assert max(held) == 2 * len(IDS), "keys and values of one layer for each sequence, for the layer after it"
        assert not sources._rows
        assert all(store._decoded is None for layer in cache.layers for _, store in layer.store.stores())
        assert cache.nbytes < 1.2 * size


def test_beams_share_what_is_stored(model: LlamaForCausalLM, artifact: Artifact) -> None:
    with packed_cache(model, artifact, policy=POLICY) as new_cache:
        options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
        beams = model.generate(IDS[:1], **cache_argument(model, new_cache()), **options)
    assert beams.shape == (1, 46)


@pytest.mark.parametrize(
    "policy",
    [
        CachePolicy(values=ResidualWindow(residual_tokens=3)),
        CachePolicy(keep_smallest_norm=2),
        CachePolicy(eviction=Eviction(decoding="slide")),
    ],
)
def test_policies_that_part_the_sites_are_refused(
    policy: CachePolicy, model: LlamaForCausalLM, artifact: Artifact
) -> None:
    with pytest.raises(MismatchError, match="Use one window"), packed_cache(model, artifact, policy=policy):
        pass
