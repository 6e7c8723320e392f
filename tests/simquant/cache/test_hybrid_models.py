"""Packed caches of models some of whose layers keep running states, or read the keys and values of others."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.architectures import build
from helpers.caches import generate
from transformers import PreTrainedModel

from artifacts.errors import UnsupportedModelError
from artifacts.model.attention import attention_layers
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site, Stage
from simquant import CacheStateError, KIVICache, decode_exact, packed_cache, save_cache, simulate

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
IDS = torch.arange(1, 13).reshape(2, 6)

pytestmark = pytest.mark.filterwarnings("ignore")  # kernels that are not installed


@pytest.fixture
def hybrid() -> PreTrainedModel:
    """A running state in layers 0 and 2, attention in 1 and 3."""
    turns = ["linear_attention", "full_attention"] * 2
    return build("olmo_hybrid", {**DELTA, "num_hidden_layers": 4, "layer_types": turns})


def everywhere(model: PreTrainedModel, kind: type[Quantizer], stage: Stage, **settings: int) -> dict[Site, Quantizer]:
    sites = [
        (layer, site)
        for layer in attention_layers(model)
        for site in (Site(layer.layer, "key", stage), Site(layer.layer, "value"))
    ]
    return {site: kind(channels=layer.channels, **settings) for layer, site in sites}


@pytest.mark.parametrize("stage", ["pre_rope", "post_rope"])
@torch.no_grad()
def test_a_hybrid_generates_on_a_packed_cache(stage: Stage, hybrid: PreTrainedModel) -> None:
    expected = generate(hybrid, IDS)
    with packed_cache(hybrid, everywhere(hybrid, Identity, stage)) as new_cache:
        cache = new_cache()
        assert torch.equal(generate(hybrid, IDS, cache), expected)
        assert [layer.store.layer.layer for layer in cache.packed] == [1, 3]
        states = [*cache.beside[0].conv_states.values(), *cache.beside[0].recurrent_states.values()]
        assert cache.nbytes > sum(state.nbytes for state in states) > 0
    assert torch.equal(generate(hybrid, IDS), expected)


@torch.no_grad()
def test_a_hybrid_decodes_as_one_pass_says(hybrid: PreTrainedModel) -> None:
    quantizers = everywhere(hybrid, DynamicAffine, "pre_rope", bits=3)
    with simulate(hybrid, quantizers):
        simulated = hybrid(IDS, use_cache=False).logits
    with decode_exact(hybrid, quantizers):
        once = hybrid(IDS, use_cache=False).logits
    with packed_cache(hybrid, quantizers) as new_cache:
        cache = new_cache()
        steps = [hybrid(IDS[:, t : t + 1], **cache_argument(hybrid, cache)).logits for t in range(6)]
    torch.testing.assert_close(once, simulated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(steps, 1), simulated, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_and_beams_take_the_running_states_along(hybrid: PreTrainedModel) -> None:
    options = {"num_beams": 2, "max_new_tokens": 3}
    expected = generate(hybrid, IDS, **options)
    with packed_cache(hybrid, everywhere(hybrid, Identity, "pre_rope")) as new_cache:
        assert torch.equal(generate(hybrid, IDS, new_cache(), **options), expected)
        cache = new_cache()
        hybrid(IDS[:, :3], **cache_argument(hybrid, cache))
        other = copy.deepcopy(cache)
        first = hybrid(IDS[:, 3:], **cache_argument(hybrid, cache)).logits
        assert torch.equal(hybrid(IDS[:, 3:], **cache_argument(hybrid, other)).logits, first)


@torch.no_grad()
def test_what_a_running_state_cannot_do_is_refused(hybrid: PreTrainedModel, tmp_path: Path) -> None:
    with packed_cache(hybrid, everywhere(hybrid, Identity, "pre_rope")) as new_cache:
        cache = new_cache()
        hybrid(IDS, **cache_argument(hybrid, cache))
        with pytest.raises(CacheStateError, match="running states, which cannot be taken back"):
            cache.crop(-1)
        with pytest.raises(UnsupportedModelError, match=r"save_cache: .*running states"):
            save_cache(cache, tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_kivi_cache_of_a_hybrid(hybrid: PreTrainedModel) -> None:
    with KIVICache(hybrid, k_bits=2, v_bits=2, group_size=2, residual_length=2) as cache:
        generate(hybrid, IDS, cache)
        assert cache.get_cache_info()["num_layers"] == 2


@torch.no_grad()
def test_layers_that_read_the_keys_of_others_are_refused_not_misread() -> None:
    shared = {"num_kv_shared_layers": 1, "layer_types": ["full_attention", "full_attention"]}
    sizes = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
    model = build("gemma4_text", {**shared, **sizes})
    with (
        packed_cache(model, everywhere(model, Identity, "pre_rope")) as new_cache,
        pytest.raises(UnsupportedModelError, match="one that reads those of another"),
    ):
        model(IDS, **cache_argument(model, new_cache()))


def test_models_with_a_cache_class_of_their_own_are_refused() -> None:
    model = build("minimax", {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2})
    with (
        pytest.raises(UnsupportedModelError, match="takes a class of its own alone"),
        packed_cache(model, everywhere(model, Identity, "pre_rope")),
    ):
        pass
