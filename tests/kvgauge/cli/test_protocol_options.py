"""Options for windows and eviction: what the command line, the recipe and an artifact make of the policy."""

import json

import pytest
import torch
from helpers.caches import step
from helpers.sites import everywhere, per_group
from transformers import LlamaForCausalLM

from calib import calibrate
from calib.recipe.recipe import Recipe, RecipeError, load_recipe
from kvgauge.cli import evaluate as evaluate_program
from kvgauge.cli.options.common import parsed
from kvgauge.cli.options.protocol import add_protocol_options
from kvgauge.configuration.protocol import ProtocolConfig, protocol_settings
from kvgauge.terminal.console import Parser, UsageError
from simquant import CachePolicy, Eviction, ResidualWindow, decode_exact, packed_cache
from simquant.policy.checks import default_policy

KIVI = {"residual_tokens": 1, "block_tokens": 8, "values": {"residual_tokens": 9}, "exact_prefill": True}
KIVI_POLICY = CachePolicy(
    residual_tokens=1, block_tokens=8, values=ResidualWindow(residual_tokens=9), exact_prefill=True
)
IDS = torch.randint(3, 64, (1, 30), generator=torch.Generator().manual_seed(1))


def policy_of(flags: str, cache: dict[str, object] | None = None) -> CachePolicy:
    parser = Parser("evaluate")
    add_protocol_options(parser)
    config = parsed(ProtocolConfig, parser.parse_args(flags.split()))
    found = protocol_settings(config, everywhere(per_group), 2, cache)["policy"]
    assert isinstance(found, CachePolicy)
    return found


@pytest.mark.parametrize(
    ("flags", "cache", "expected"),
    [
        ("", KIVI, {}),
        ("--protocol decode", None, {"block_tokens": 4}),
        ("--protocol decode", KIVI, vars(KIVI_POLICY)),
        ("--protocol cache --no-exact-prefill", KIVI, {**vars(KIVI_POLICY), "exact_prefill": False}),
        (
            "--protocol cache --residual-tokens 5",
            KIVI,
            {"residual_tokens": 5, "block_tokens": 4, "exact_prefill": True},
        ),
        ("--protocol cache --block-tokens 16", KIVI, {"block_tokens": 16, "exact_prefill": True}),
        ("--protocol decode --residual-tokens 3 --block-tokens 12", None, {"residual_tokens": 3, "block_tokens": 12}),
        ("--protocol decode --residual-length 8 --exact-prefill", None, vars(KIVI_POLICY)),
        ("--protocol decode --keep-smallest-norm 3", None, {"block_tokens": 4, "keep_smallest_norm": 3}),
        ("--protocol decode", {**KIVI, "keep_smallest_norm": 2}, {**vars(KIVI_POLICY), "keep_smallest_norm": 2}),
    ],
)
def test_flags_change_what_the_recipe_says(
    flags: str, cache: dict[str, object] | None, expected: dict[str, object]
) -> None:
    assert policy_of(flags, cache) == CachePolicy(**{**expected, "sink_tokens": 2})


def test_eviction_is_asked_for_under_the_names_of_scope() -> None:
    flags = "--protocol cache --prefill-tokens 600 --method SnapKV --prefill-window-size 512 --prefill-recent-size 8"
    flags += " --pooling maxpool --kernel-size 7 --decoding-metric adaptive --decoding-window-size 96"
    found = policy_of(f"{flags} --decoding-recent-size 16 --delta 3").eviction
    assert found == Eviction(
        prefill="snapkv",
        prefill_tokens=512,
        prefill_recent_tokens=8,
        pooling="max",
        kernel_tokens=7,
        decoding="adaptive",
        decoding_tokens=96,
        decoding_recent_tokens=16,
        growth_steps=3,
    )
    same = "--protocol cache --prefill-tokens 600 --method snapkv --max-capacity-prompt 512 --window-size 8"
    assert policy_of(same).eviction == Eviction(prefill="snapkv", prefill_tokens=512, prefill_recent_tokens=8)
    assert policy_of("--protocol cache").eviction is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--block-tokens 4", "--block-tokens: no effect with --protocol full"),
        ("--keep-smallest-norm 4", "--keep-smallest-norm: no effect with --protocol full"),
        ("--protocol decode --residual-length 8 --block-tokens 4", "sets both windows"),
        ("--method snapkv", "--method: tokens are dropped only from a cache; add --protocol cache"),
        ("--protocol decode --decoding-metric slide", "--decoding-metric: tokens are dropped only from a cache"),
        (
            "--protocol cache --pooling avgpool",
            "no token would ever be dropped; add --decoding-metric, or a --method other than ALLKV",
        ),
        ("--protocol cache --method AllKV", "no token would ever be dropped"),
        (
            "--protocol cache --method SnapKV",
            "has 1 tokens and 2048 may be kept, so that none is dropped; raise --prefill-tokens",
        ),
        ("--protocol cache --method best", "method: expected one of allkv, snapkv"),
        (
            "--protocol cache --decoding-metric slide --decoding-window-size 8",
            "decoding_recent_size must be below decoding_window_size",
        ),
    ],
)
def test_what_cannot_be_is_refused(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        policy_of(flags)


def test_a_cache_that_evicts_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "demo --abits 4 --pertoken k_proj v_proj --seqlen 96 --limit 1 --device cpu --json --protocol cache"
    evicting = "--prefill-tokens 64 --chunk-tokens 8 --method H2O --max_capacity_prompt 32 --window_size 8"
    assert evaluate_program.main(f"{flags} {evicting} --keep_smallest_norm 2".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert "32 tokens of the prompt kept by h2o" in found["protocol"]
    assert "among the 2 smallest so far exact" in found["protocol"]
    assert 0.5 < found["quantized_fraction"] < 1
    assert evaluate_program.main(f"{flags.replace('cache', 'decode')} {evicting}".split()) == 2
    assert "tokens are dropped only from a cache" in capsys.readouterr().err


def test_a_recipe_says_how_its_codes_are_meant_to_be_used() -> None:
    recipe = load_recipe("kivi-2")
    assert recipe.cache is not None
    found = CachePolicy.from_entry(recipe.cache.model_dump(), 0)
    assert found == CachePolicy(
        residual_tokens=1, block_tokens=128, values=ResidualWindow(residual_tokens=129), exact_prefill=True
    )
    with pytest.raises(RecipeError, match=r"cache\.block_tokens"):
        recipe.edited({"cache": {"block_tokens": 0}})
    with pytest.raises(RecipeError, match="residual_length"):
        recipe.edited({"cache": {"residual_length": 4}})
    with pytest.raises(ValueError, match=r"CachePolicy: expected .* with fields of a policy; .*later"):
        CachePolicy.from_entry({"later": 1}, 0)
    assert load_recipe("kvquant").cache is None


def test_an_artifact_carries_its_policy(tiny_llama: LlamaForCausalLM) -> None:
    data = load_recipe("kivi-2").model_dump(mode="json")
    data["key"]["group_size"], data["value"]["group_size"], data["cache"] = 4, 8, KIVI
    artifact = calibrate(tiny_llama, IDS, Recipe.parse(data, "here"))
    assert default_policy(artifact) == KIVI_POLICY
    with packed_cache(tiny_llama, artifact) as new:
        cache = new()
        first = step(tiny_llama, cache, IDS)
        key, value = cache.layers[0].store.sequences[0].stores()
        assert (key.n_encoded, value.n_encoded) == (24, 21)
    torch.testing.assert_close(first, tiny_llama(IDS).logits.detach(), rtol=1e-4, atol=1e-5)  # exact prefill
    with decode_exact(tiny_llama, artifact) as usage:
        tiny_llama(IDS, use_cache=False)
    assert usage.quantized_fraction == (24 + 21) / 60
    assert default_policy(everywhere(per_group)) == CachePolicy(block_tokens=4)
