"""Sites of real architectures: found, verified, observed and replaced; those that cannot be, refused with a reason."""

from collections.abc import Callable

import pytest
import torch
from helpers.architectures import EXPERTS, SUPPORTED, build, supported
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from artifacts.errors import MismatchError, UnsupportedModelError
from artifacts.model.attention import AttentionLayer, Hook, attention_layers, hooked, rotate, site_table
from artifacts.model.transformers_release import cache_argument, returned_cache
from artifacts.sites import Site

LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["full_attention", "linear_attention"],
}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 16}
SHARED = {
    "head_dim": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 1,
    "layer_types": ["full_attention", "full_attention"],
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
TURNS = ["linear_attention", "full_attention"]
REFUSED = {
    "deepseek_v3": ({**LATENT, "first_k_dense_replace": 2}, r"layers\.0 \(model\.layers\.0\.self_attn\): .*latents"),
    "deepseek_v32": ({**LATENT, "first_k_dense_replace": 2}, r"layers\.0 .*: multi-head latent attention"),
    "mamba": ({"state_size": 4}, r"layers\.0 .*: MambaMixer has a running state and no keys and values"),
    "zamba": (
        {"layers_block_type": ["hybrid", "linear_attention"] * 2, "num_hidden_layers": 4},
        r"layers\.0 .*keys and values come from a module that has no layer_idx",
    ),
    "jetmoe": ({"kv_channels": 8, "num_local_experts": 2}, r"layers\.0 .*: its forward pass calls no query projection"),
    "llama4_text": ({**LLAMA4, "head_dim": 8}, r"layers\.0 .*: the cached key must be the output of k_proj"),
    "olmo": ({"clip_qkv": 8.0}, r"layers\.0 .*: the cached value must be the output of v_proj"),
}
PARTIAL = {
    "olmo_hybrid": ({**DELTA, "layer_types": TURNS}, {1}, "OlmoHybridGatedDeltaNet has a running state and no keys"),
    "minimax": (
        {"layer_types": TURNS, "num_local_experts": 2},
        {1},
        "MiniMaxLightningAttention has a running state and no keys",
    ),
    "qwen3_next": ({**LINEAR, **EXPERTS}, {0}, "Qwen3NextGatedDeltaNet has a running state and no keys"),
    "gemma4_text": (SHARED, {0}, "projects queries but no keys: it reads the keys and values of another"),
    "recurrent_gemma": (
        {"head_dim": 8, "block_types": ["recurrent", "attention"], "attention_window_size": 4, "lru_width": 32},
        {1},
        " by the model's configuration",
    ),
}
KEY, ROTATED, VALUE = Site(1, "key", "pre_rope"), Site(1, "key", "post_rope"), Site(1, "value")
QUERY, ROTATED_QUERY = Site(1, "query", "pre_rope"), Site(1, "query", "post_rope")
IDS = torch.arange(1, 15).reshape(2, 7)

every_architecture = pytest.mark.parametrize("kind", SUPPORTED)


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def run(model: PreTrainedModel) -> tuple[Tensor, DynamicCache]:
    """Logits, and a cache without a sliding window, so that it shows all that it was given."""
    output = model(IDS, **cache_argument(model, DynamicCache()))
    return output.logits, returned_cache(output)


def observe(kind: str, *sites: Site) -> tuple[dict[Site, Tensor], DynamicCache]:
    model, layers = supported(kind)
    seen: dict[Site, Tensor] = {}
    with hooked(layers, {site: lambda x, site=site: seen.update({site: x.clone()}) for site in sites}):
        _, stored = run(model)
    return seen, stored


def tables(model: PreTrainedModel, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """The (cos, sin) that a layer is called with."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = layer.module.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    run(model)
    handle.remove()
    return layer.tables(found[0])


@every_architecture
def test_what_is_seen_is_what_a_cache_stores(kind: str) -> None:
    model, layers = supported(kind)
    seen, stored = observe(kind, KEY, ROTATED, VALUE)
    assert torch.equal(seen[ROTATED], stored.layers[1].keys)
    assert torch.equal(seen[VALUE], stored.layers[1].values)
    turned = rotate(seen[KEY], *tables(model, layers[1]), layers[1].rotation)
    torch.testing.assert_close(turned, seen[ROTATED])
    assert torch.equal(seen[KEY], seen[ROTATED]) == (layers[1].rotation == "none")


@every_architecture
def test_layers_describe_the_model(kind: str) -> None:
    model, layers = supported(kind)
    assert [layer.layer for layer in layers] == [0, 1]
    for layer in layers:
        assert model.get_submodule(layer.name) is layer.module
        assert (layer.q_heads, layer.kv_heads) == (4, 2)
        assert layer.channels == 2 * SUPPORTED[kind].get("head_dim", 8)


@pytest.mark.parametrize("answer", [lambda x: x, lambda x: x.clone(), lambda x: None])
@every_architecture
def test_identity_is_bit_identical(kind: str, answer: Callable[[Tensor], Tensor | None]) -> None:
    model, layers = supported(kind)
    expected, _ = run(model)
    with hooked(layers, dict.fromkeys((KEY, ROTATED, VALUE, QUERY), answer)):
        logits, _ = run(model)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("site", [KEY, ROTATED, VALUE], ids=str)
@every_architecture
def test_a_replacement_is_what_is_stored_and_attended_to(kind: str, site: Site) -> None:
    model, layers = supported(kind)
    expected, before = run(model)
    with hooked(layers, {site: torch.zeros_like}):
        logits, after = run(model)
    pairs = {
        tensor: (getattr(before.layers[1], tensor), getattr(after.layers[1], tensor)) for tensor in ("keys", "values")
    }
    (_, replaced), (old, kept) = pairs["values"], pairs["keys"]
    if site != VALUE:
        (_, replaced), (old, kept) = pairs["keys"], pairs["values"]
    assert not replaced.any()
    assert torch.equal(kept, old)
    assert not torch.equal(logits, expected)
    assert torch.equal(run(model)[0], expected)


@every_architecture
def test_a_replacement_goes_on_unchanged(kind: str) -> None:
    model, layers = supported(kind)
    x = {site: torch.randn(2, 2, 7, layers[1].head_dim) for site in (KEY, VALUE)}
    with hooked(layers, {site: lambda _, site=site: x[site] for site in x}):
        _, stored = run(model)
    assert torch.equal(stored.layers[1].values, x[VALUE])
    turned = rotate(x[KEY], *tables(model, layers[1]), layers[1].rotation)
    torch.testing.assert_close(stored.layers[1].keys, turned)


@every_architecture
def test_queries_rotate_like_keys(kind: str) -> None:
    model, layers = supported(kind)
    seen, _ = observe(kind, QUERY, ROTATED_QUERY)
    assert seen[QUERY].shape == (2, 4, 7, layers[1].head_dim)
    assert torch.equal(rotate(seen[QUERY], *tables(model, layers[1]), layers[1].rotation), seen[ROTATED_QUERY])


@every_architecture
def test_generation(kind: str) -> None:
    model, layers = supported(kind)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "use_cache": True}
    expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    lengths: dict[Site, list[int]] = {site: [] for site in (KEY, ROTATED, VALUE)}
    with hooked(layers, {site: lambda x, site=site: lengths[site].append(x.shape[2]) for site in lengths}):
        tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(tokens, expected)
    assert all(steps == [7, 1, 1] for steps in lengths.values())


@pytest.mark.parametrize("site", [KEY, ROTATED, VALUE, QUERY, ROTATED_QUERY], ids=str)
def test_no_hook_survives_an_exception(site: Site) -> None:
    model, layers = supported("phi3")

    def fail(x: Tensor) -> None:
        raise ZeroDivisionError

    with hooked(layers, {site: fail}):
        assert n_hooks(model) > 0
    with pytest.raises(ZeroDivisionError), hooked(layers, {site: fail}):
        run(model)
    assert n_hooks(model) == 0


def test_no_hook_survives_a_failed_registration() -> None:
    model, layers = supported("llama")
    unknown = Site(7, "key", "pre_rope")
    with (
        pytest.raises(MismatchError, match=r"layers\.7\.key\.pre_rope: .*\[0, 1\]; got layer 7"),
        hooked(layers, {KEY: torch.zeros_like, ROTATED: torch.zeros_like, unknown: torch.zeros_like}),
    ):
        pass
    assert n_hooks(model) == 0


@pytest.mark.parametrize("site", [KEY, ROTATED, VALUE], ids=str)
@pytest.mark.parametrize("damage", [lambda x: x[..., :1], lambda x: x.double(), lambda x: x.transpose(1, 2)])
def test_a_replacement_of_another_kind_is_refused(site: Site, damage: Callable[[Tensor], Tensor]) -> None:
    model, layers = supported("llama")
    with pytest.raises(MismatchError, match=f"^{site}: "), hooked(layers, {site: damage}):
        run(model)


def test_rotated_queries_cannot_be_replaced() -> None:
    model, layers = supported("llama")
    with pytest.raises(TypeError, match=r"layers\.1\.query\.post_rope"), hooked(layers, {ROTATED_QUERY: lambda x: x}):
        run(model)


@pytest.mark.parametrize("site", [KEY, ROTATED, VALUE], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3"])
def test_outer_contexts_come_first(kind: str, site: Site) -> None:
    model, layers = supported(kind)
    _, before = run(model)
    with hooked(layers, {site: lambda x: x + 1}), hooked(layers, {site: torch.zeros_like}):
        _, zeroed = run(model)
    with hooked(layers, {site: torch.zeros_like}), hooked(layers, {site: lambda x: x + 1}):
        _, ones = run(model)
    name = "values" if site == VALUE else "keys"
    assert not getattr(zeroed.layers[1], name).any()
    assert getattr(ones.layers[1], name).abs().amin(dim=-1).amax() > 0
    assert getattr(ones.layers[1], name).shape == getattr(before.layers[1], name).shape
    assert n_hooks(model) == 0


def test_post_rope_without_a_cache() -> None:
    model, layers = supported("llama")
    with torch.no_grad(), hooked(layers, {ROTATED: torch.zeros_like}):
        bare = model(IDS, use_cache=False).logits
        assert torch.equal(bare, run(model)[0])


@pytest.mark.parametrize("layout", ["flat", "tokens_first", "heads_first"])
def test_write_then_read(layout: str) -> None:
    shape = {"flat": (2, 5, 12), "tokens_first": (2, 5, 3, 4), "heads_first": (2, 3, 5, 4)}[layout]
    hook, output = Hook(nn.Identity(), None, 3, 4, layout), torch.randn(shape)
    x, untouched = torch.randn(2, 3, 5, 4), output.clone()
    assert torch.equal(hook.read(hook.write(output, x)), x)
    assert torch.equal(hook.write(output, hook.read(output)), output)
    assert torch.equal(output, untouched)
    assert hook.read(output).data_ptr() == output.data_ptr()


def test_a_fused_projection_changes_in_its_columns_only() -> None:
    hook, output = Hook(nn.Identity(), (slice(4, 10),), 2, 3, "flat"), torch.randn(2, 5, 16)
    x, untouched = torch.randn(2, 2, 5, 3), output.clone()
    written = hook.write(output, x)
    assert torch.equal(hook.read(written), x)
    assert torch.equal(written[..., :4], output[..., :4])
    assert torch.equal(written[..., 10:], output[..., 10:])
    assert torch.equal(output, untouched)


@pytest.mark.parametrize("rotation", ["half", "interleaved"])
def test_rotation_keeps_lengths_and_undoes_itself(rotation: str) -> None:
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 2)
    angles = torch.cat([angles, angles], -1) if rotation == "half" else angles.repeat_interleave(2, -1)
    turned = rotate(x, angles.cos(), angles.sin(), rotation)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, angles.cos(), -angles.sin(), rotation), x)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.isclose(turned[..., :4], x[..., :4]).all()


def test_which_rotations() -> None:
    expected = dict.fromkeys(SUPPORTED, "half") | {"cohere": "interleaved", "glm": "interleaved"}
    found = {kind: {layer.rotation for layer in supported(kind)[1]} for kind in SUPPORTED}
    assert found.pop("smollm3") == {"half", "none"}
    assert found == {kind: {expected[kind]} for kind in found}


def test_sliding_windows() -> None:
    windows = {kind: [layer.sliding_window for layer in supported(kind)[1]] for kind in SUPPORTED}
    assert windows["llama"] == [None, None]
    assert windows["mistral"] == [4, 4]
    assert windows["gemma2"] == windows["gemma3_text"] == [4, None]


@pytest.mark.parametrize(
    ("kind", "hooks"),
    [
        ("llama", ("k_proj", "v_proj", "q_proj")),
        ("qwen3", ("k_norm", "v_proj", "q_norm")),
        ("phi3", ("qkv_proj[32:48]", "qkv_proj[48:64]", "qkv_proj[0:32]")),
        ("stablelm", ("k_layernorm", "v_proj", "q_layernorm")),
    ],
)
def test_the_table_names_the_hooks(kind: str, hooks: tuple[str, ...]) -> None:
    model, layers = supported(kind)
    rows = site_table(model)
    assert [(row.layer, row.name, row.status, row.why) for row in rows] == [
        (i, layers[i].name, "applied", "") for i in (0, 1)
    ]
    assert [row.hooks for row in rows] == [hooks, hooks]
    assert [(row.kv_heads, row.head_dim) for row in rows] == [(2, layers[0].head_dim)] * 2


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_architectures_are_refused_with_a_reason(kind: str) -> None:
    options, reason = REFUSED[kind]
    model = build(kind, options)
    with pytest.raises(UnsupportedModelError, match=reason):
        attention_layers(model)
    rows = site_table(model)
    assert [row.layer for row in rows] == list(range(options.get("num_hidden_layers", 2)))
    assert all(row.why and row.kv_heads is None and row.hooks == () and row.status != "applied" for row in rows)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("kind", PARTIAL)
@pytest.mark.filterwarnings("ignore")
def test_layers_without_keys_and_values_are_left_out(kind: str) -> None:
    options, own, reason = PARTIAL[kind]
    model = build(kind, options)
    layers = attention_layers(model)
    assert {layer.layer for layer in layers} == own
    for row in site_table(model):
        assert row.status == ("applied" if row.layer in own else "without")
        assert row.why == "" if row.layer in own else reason in row.why
    expected = model(IDS, use_cache=False).logits
    for layer in layers:
        for site in (Site(layer.layer, "key", "post_rope"), Site(layer.layer, "value")):
            with hooked(layers, {site: torch.zeros_like}):
                assert not torch.equal(model(IDS, use_cache=False).logits, expected)
    assert n_hooks(model) == 0


@pytest.mark.parametrize(("kind", "options"), [("nanochat", {}), ("hunyuan_v1_dense", {"head_dim": 8})])
def test_a_norm_after_the_rotary_embedding_is_hooked(kind: str, options: dict[str, object]) -> None:
    model = build(kind, options)
    layers, seen = attention_layers(model), {}
    with hooked(layers, {KEY: lambda x: seen.update(key=x.clone()), ROTATED: lambda x: seen.update(rotated=x.clone())}):
        _, stored = run(model)
    assert {layer.rotation for layer in layers} == {"none"}
    assert torch.equal(seen["key"], stored.layers[1].keys)
    assert torch.equal(seen["key"], seen["rotated"])


def test_a_complex_rotary_table_is_read() -> None:
    layers = attention_layers(build("llama4_text", {**LLAMA4, "head_dim": 8, "use_qk_norm": False}))
    assert {(layer.rotation, layer.table_order, layer.rotary_dim) for layer in layers} == {("interleaved", "once", 8)}


def test_a_layer_that_reads_the_cache_of_another_is_refused() -> None:
    model = build("llama", {})
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 .*: never calls cache\.update"):
        attention_layers(model)


def test_missing_and_repeated_layers_are_refused() -> None:
    model = build("llama", {"num_hidden_layers": 3})
    model.model.layers[1].self_attn.layer_idx = 2
    why = {row.layer: row.why for row in site_table(model)}
    assert why[0] == ""
    assert why[1].endswith("got 0")
    assert why[2].endswith("got 2")


def test_no_attention_at_all_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="Sequential: expected attention modules"):
        attention_layers(model)
    assert site_table(model) == []


@pytest.mark.parametrize("damage", ["zero keys", "equal projections"])
def test_weights_do_not_mislead(damage: str) -> None:
    model = build("cohere", {})
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.zero_()
        if damage == "equal projections":
            layer.self_attn.v_proj.weight.data.zero_()
    assert {layer.rotation for layer in attention_layers(model)} == {"interleaved"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "cohere", "gemma3_text", "phi3"])
def test_models_of_other_precision(kind: str, dtype: torch.dtype) -> None:
    layers = attention_layers(build(kind, SUPPORTED[kind]).to(dtype))
    assert [layer.rotation for layer in layers] == [layer.rotation for layer in supported(kind)[1]]


def test_a_model_in_float64_may_rotate_in_float32() -> None:
    """Its keys were refused as no rotation of what k_proj returns."""
    layers = attention_layers(build("ernie4_5", {}).double())
    assert [layer.rotation for layer in layers] == ["interleaved", "interleaved"]


def test_the_probe_leaves_no_trace() -> None:
    model = build("llama", {})
    model.model.layers[0].train()
    flags, random_state = [m.training for m in model.modules()], torch.get_rng_state()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention_layers(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert n_hooks(model) == 0
