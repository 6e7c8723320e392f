"""Keys, values and queries that share a projection, go by other names, or are rotated from a table of the module's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from artifacts.model.attention import AttentionLayer, Hook, attention_layers, hooked, rotate, site_table
from artifacts.model.rope import position_tables
from artifacts.model.transformers_release import returned_cache
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site
from simquant.simulate import simulate

pytestmark = pytest.mark.shapes

# transformers 5.17 compiles a part of GPTBigCode as torch no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
LONG = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHORT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
CPMANT = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 32}
BART = {**TOKENS, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
FAMILIES: dict[str, tuple[str, dict[str, object], tuple[int, int]]] = {
    "gpt2": ("gpt2", SHORT, (4, 4)),
    "gpt_bigcode, multi-query": ("gpt_bigcode", {**SHORT, "multi_query": True}, (4, 1)),
    "gpt_bigcode": ("gpt_bigcode", {**SHORT, "multi_query": False}, (4, 4)),
    "gpt_neox": ("gpt_neox", {**LONG, "intermediate_size": 32}, (4, 4)),
    "bloom": ("bloom", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, (4, 4)),
    "mpt": ("mpt", {**TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, (4, 4)),
    "falcon, multi-query": ("falcon", LONG, (4, 1)),
    "falcon, grouped": ("falcon", {**LONG, **GROUPED}, (4, 2)),
    "falcon, alibi": ("falcon", {**LONG, "multi_query": False, "num_kv_heads": 4, "alibi": True}, (4, 4)),
    "gptj": ("gptj", {**SHORT, "rotary_dim": 4}, (4, 4)),
    "codegen": ("codegen", {**SHORT, "rotary_dim": 4}, (4, 4)),
    "persimmon": ("persimmon", {**LONG, "intermediate_size": 32}, (4, 4)),
    "ctrl": ("ctrl", {**SHORT, "dff": 32}, (4, 4)),
    "cpmant": ("cpmant", CPMANT, (4, 4)),
    "bart": ("bart", BART, (4, 4)),
    "rembert": ("rembert", {**LONG, "intermediate_size": 32, "input_embedding_size": 32, "is_decoder": True}, (4, 4)),
    "bert": ("bert", {**LONG, "intermediate_size": 32, "is_decoder": True}, (4, 4)),
}
KEY, ROTATED, VALUE = Site(1, "key", "pre_rope"), Site(1, "key", "post_rope"), Site(1, "value")
QUERY, ROTATED_QUERY = Site(1, "query", "pre_rope"), Site(1, "query", "post_rope")
IDS = torch.arange(1, 15).reshape(2, 7)

every_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def family(name: str) -> tuple[PreTrainedModel, tuple[AttentionLayer, ...]]:
    kind, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options)).eval()
    return model, attention_layers(model)


@torch.no_grad()
def run(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the last layer's keys and values in the model's own cache."""
    output = model(IDS, use_cache=True)
    kept = returned_cache(output)
    stored = getattr(kept, "self_attention_cache", kept).layers[1]
    return output.logits, stored.keys, stored.values


@contextmanager
def scaled_dot_product_queries() -> Iterator[list[Tensor]]:
    """The queries that reach torch's own attention function."""
    seen: list[Tensor] = []
    original = nn.functional.scaled_dot_product_attention

    def watch(query: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(query)
        return original(query, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", watch)
        yield seen


@every_family
def test_what_is_seen_is_what_the_cache_stores(name: str) -> None:
    model, layers = family(name)
    seen: dict[Site, Tensor] = {}
    tables: list[object] = []
    handle = layers[1].module.register_forward_pre_hook(
        lambda module, args, kwargs: tables.append(position_tables(module, kwargs)), with_kwargs=True
    )
    with hooked(layers, {s: lambda x, s=s: seen.update({s: x.clone()}) for s in (KEY, ROTATED, VALUE)}):
        _, keys, values = run(model)
    handle.remove()
    assert (layers[1].q_heads, layers[1].kv_heads, layers[1].head_dim) == (*FAMILIES[name][2], 8)
    assert torch.equal(seen[ROTATED].repeat_interleave(layers[1].copies, dim=1), keys)
    assert torch.equal(seen[VALUE].repeat_interleave(layers[1].copies, dim=1), values)
    if layers[1].rotation == "none":
        assert torch.equal(seen[KEY], seen[ROTATED])
    else:
        turned = rotate(seen[KEY], *layers[1].tables(tables[0]), layers[1].rotation)
        torch.testing.assert_close(turned, seen[ROTATED])
        assert not torch.allclose(seen[KEY], seen[ROTATED])


@pytest.mark.parametrize("answer", [lambda x: x.clone(), lambda x: None])
@every_family
def test_identity_is_bit_identical(name: str, answer: Callable[[Tensor], Tensor | None]) -> None:
    model, layers = family(name)
    expected, _, _ = run(model)
    with hooked(layers, dict.fromkeys((KEY, ROTATED, VALUE, QUERY), answer)):
        assert torch.equal(run(model)[0], expected)


@every_family
def test_16_bits_simulate_the_model_itself(name: str) -> None:
    model, layers = family(name)
    identity = Identity(channels=layers[0].channels)
    quantizers = {Site(i, "key", "pre_rope"): identity for i in (0, 1)} | {Site(i, "value"): identity for i in (0, 1)}
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        with simulate(model, quantizers, layers=layers) as usage:
            assert torch.equal(model(IDS, use_cache=False).logits, expected)
    assert usage.average_bits == 32


@pytest.mark.parametrize("site", [KEY, ROTATED, VALUE], ids=str)
@every_family
def test_a_replacement_is_stored_and_changes_nothing_else(name: str, site: Site) -> None:
    model, layers = family(name)
    expected, keys, values = run(model)
    x = torch.randn(2, layers[1].kv_heads, keys.shape[2], layers[1].head_dim)
    with hooked(layers, {site: lambda _: x}):
        logits, new_keys, new_values = run(model)
    (kept, old), new = ((new_values, values), new_keys) if site != VALUE else ((new_keys, keys), new_values)
    assert torch.equal(kept, old)
    if site != KEY or layers[1].rotation == "none":
        assert torch.equal(new, x.repeat_interleave(layers[1].copies, dim=1))
    assert not torch.equal(logits, expected)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.split(",")[0] in ("gpt_neox", "gpt_bigcode")])
def test_what_keys_and_values_leave_of_a_projection_are_the_queries(name: str) -> None:
    model, layers = family(name)
    seen: list[Tensor] = []
    with hooked(layers, {ROTATED_QUERY: lambda x: seen.append(x.clone())}), scaled_dot_product_queries() as queries:
        run(model)
    assert torch.equal(seen[0], queries[1])


def test_a_fused_projection_may_take_turns_between_the_three() -> None:
    shares = [[f"{start + first}:{start + first + 8}" for start in range(0, 96, 24)] for first in (8, 16, 0)]
    expected = tuple(f"query_key_value[{', '.join(share)}]" for share in shares)
    assert {row.hooks for row in site_table(family("gpt_neox")[0])} == {expected}


def test_columns_in_several_places_are_read_and_written_in_the_order_of_the_heads() -> None:
    hook, output = Hook(nn.Identity(), (slice(6, 9), slice(0, 3)), 2, 3, "flat"), torch.randn(2, 5, 12)
    x, untouched = torch.randn(2, 2, 5, 3), output.clone()
    assert torch.equal(hook.read(output)[:, 1], output[..., :3])
    written = hook.write(output, x)
    assert torch.equal(hook.read(written), x)
    assert torch.equal(written[..., 3:6], output[..., 3:6])
    assert torch.equal(output, untouched)
    assert torch.equal(hook.write(output, hook.read(output)), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gpt_neox", "falcon, grouped", "codegen", "gptj"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    kind, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    layers = attention_layers(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options)).to(dtype).eval())
    assert [layer.key.columns for layer in layers] == [layer.key.columns for layer in family(name)[1]]
    assert [layer.rotation for layer in layers] == [layer.rotation for layer in family(name)[1]]
