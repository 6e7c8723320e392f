"""From statistics to an artifact: shards, jobs and files leave no trace, and the manifest tells what was done."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import artifacts
import calib
from artifacts.artifact import Artifact
from artifacts.manifest import tool_version
from artifacts.model.attention import attention_layers
from artifacts.model.fingerprint import model_fingerprint
from artifacts.sites import Site
from calib.calibration import add_windows, new_statistics
from calib.capture import capture
from calib.fitting.fit import cached_sites, fit
from calib.recipe.recipe import Recipe, load_recipe
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_statistics import SAMPLE_TOKENS, Tier
from calib.text.corpus import CorpusError

WINDOWS = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))
FITTED = ["default", "kvquant", "kvquant-rank", "kvquant-3-compact", "eigen"]
"""One recipe for each way in which estimators read statistics; all of them are fitted in `test_shipped_recipes.py`."""

every_recipe = pytest.mark.parametrize("name", FITTED)


def gathered(model: LlamaForCausalLM, windows: Tensor = WINDOWS, tier: Tier = "basic") -> ModelStatistics:
    layers = attention_layers(model)
    statistics = new_statistics(model, layers, tier=tier, corpus="random tokens", seed=0)
    add_windows(model, layers, statistics, windows)
    return statistics


def saved(artifact: Artifact, path: Path) -> bytes:
    artifacts.save(artifact, path)
    return path.read_bytes()


def relative_errors(model: LlamaForCausalLM, artifact: Artifact) -> dict[Site, float]:
    """Squared error of each site on the calibration text, over its variance."""
    layers, found = attention_layers(model), {}
    x = {site: [] for site in artifact}
    for window in WINDOWS:
        for site, part in capture(model, layers, artifact, window[None]).items():
            x[site].append(part)
    for site, parts in x.items():
        whole = torch.cat(parts)
        error = (artifact[site].simulate(whole) - whole).square().mean()
        found[site] = float(error / whole.var(dim=0).mean())
    return found


@every_recipe
def test_merged_shards_give_the_bytes_of_the_whole(tiny_llama: LlamaForCausalLM, tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    whole = fit(gathered(tiny_llama), recipe)
    shards = [gathered(tiny_llama, WINDOWS[part::3]) for part in range(3)]
    shards[2].merge(shards[0])
    shards[2].merge(shards[1])
    merged = fit(shards[2], recipe)
    assert saved(whole, tmp_path / "a.safetensors") == saved(merged, tmp_path / "b.safetensors")
    assert saved(whole, tmp_path / "a.pkl") == saved(merged, tmp_path / "b.pkl")


@every_recipe
def test_saved_statistics_fit_like_fresh_ones(tiny_llama: LlamaForCausalLM, tmp_path: Path, name: str) -> None:
    statistics = gathered(tiny_llama)
    statistics.save(tmp_path / "s.safetensors")
    loaded = ModelStatistics.load(tmp_path / "s.safetensors")
    recipe = load_recipe(name).edited({"key": {"bits": 2}, "value": {"bits": 3}})
    assert saved(fit(loaded, recipe), tmp_path / "a.pkl") == saved(fit(statistics, recipe), tmp_path / "b.pkl")


@every_recipe
def test_jobs_leave_no_trace(tiny_llama: LlamaForCausalLM, tmp_path: Path, name: str) -> None:
    statistics, seen = gathered(tiny_llama), []

    def progress(fits: object) -> object:
        for one in fits:  # type: ignore[attr-defined]
            seen.append(one)
            yield one

    alone = fit(statistics, load_recipe(name), jobs=1)
    together = fit(statistics, load_recipe(name), jobs=2, progress=progress)  # type: ignore[arg-type]
    assert saved(alone, tmp_path / "a.safetensors") == saved(together, tmp_path / "b.safetensors")
    n_fits = 1 if alone.manifest.sink_choice is None else 2
    assert (len(alone), len(seen)) == (4, 4 * n_fits)


def test_an_error_is_raised_when_no_thread_runs_any_more(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that left the pool at once ended the process inside its threads, which then aborted it."""
    statistics, done = gathered(tiny_llama), []

    def slow(self: ModelStatistics, site: Site, sink_tokens: int) -> None:
        if site.layer == 0:
            raise ValueError("the first of them")
        time.sleep(0.05)
        done.append(site)
        raise ValueError("a later one")

    monkeypatch.setattr(ModelStatistics, "site", slow)
    with pytest.raises(ValueError, match="the first of them"):
        fit(statistics, load_recipe("default"), jobs=2)
    assert len(done) == 2


def test_tiers_agree(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    recipe = load_recipe("kvquant")
    basic, full = (fit(gathered(tiny_llama, tier=tier), recipe) for tier in ("basic", "full"))
    assert saved(basic, tmp_path / "a.pkl") == saved(full, tmp_path / "b.pkl")


def test_keys_of_another_stage_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    recipe = load_recipe("default").edited({"stage": "post_rope"})
    message = (
        r"recipe default needs keys post_rope; the statistics have layers\.0\.key\.pre_rope\. Calibrate again with"
    )
    with pytest.raises(ValueError, match=message):
        fit(gathered(tiny_llama), recipe)


def test_no_windows_are_no_statistics(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.key\.pre_rope: a fit needs tokens .* 0 windows have none"):
        fit(gathered(tiny_llama, WINDOWS[:0]), load_recipe("default"))


def test_the_sites_of_a_cache_in_its_order(tiny_llama: LlamaForCausalLM) -> None:
    sites = [Site(0, "key", "pre_rope"), Site(0, "value"), Site(1, "key", "pre_rope"), Site(1, "value")]
    assert cached_sites(gathered(tiny_llama), load_recipe("default")) == sites
    assert list(fit(gathered(tiny_llama), load_recipe("default"))) == sites


def test_the_manifest_tells_what_was_done(tiny_llama: LlamaForCausalLM) -> None:
    statistics, recipe = gathered(tiny_llama), load_recipe("kvquant").edited({"key": {"bits": 3}, "sink_tokens": 2})
    artifact = fit(statistics, recipe)
    manifest = artifact.manifest
    assert Recipe.parse(dict(manifest.recipe), "manifest") == recipe
    assert manifest.model == model_fingerprint(tiny_llama, attention_layers(tiny_llama), None)
    assert (manifest.model_id, manifest.tool_version, manifest.sink_tokens) == (None, tool_version(), 2)
    corpus = manifest.corpus
    found = (corpus.name, corpus.seed, corpus.n_windows, corpus.n_tokens, corpus.seqlen)
    assert found == ("random tokens", 0, 4, 160, 40)
    assert torch.equal(artifact.ngrams, statistics.ngrams)
    assert {site.tensor: q.spec.bits for site, q in artifact.items()} == {"key": 3, "value": 4}


def test_fits_are_labelled_by_their_source(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = load_recipe("kvquant").edited(
        {"value": {"method": "codebook", "per": "token", "outliers": {"fraction": 0.07}}}
    )
    exact = fit(gathered(tiny_llama), odd).manifest.fit_sources
    assert exact["layers.0.key.pre_rope"] == "exact statistics"
    assert exact["layers.1.value"] == "reservoir of 160 tokens"
    monkeypatch.setitem(SAMPLE_TOKENS, "basic", 30)
    sampled = fit(gathered(tiny_llama), odd).manifest.fit_sources
    assert sampled["layers.0.key.pre_rope"] == "exact statistics; first positions from a sample of the windows"
    assert sampled["layers.1.value"] == "reservoir of 30 tokens; first positions from a sample of the windows"


def test_first_tokens_take_no_part_in_a_fit(tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[63] *= -20
    windows = WINDOWS.clamp_max(62)
    windows[:, 0] = 63
    statistics, layers = gathered(tiny_llama, windows), attention_layers(tiny_llama)
    site = Site(0, "key", "pre_rope")
    x = torch.cat([capture(tiny_llama, layers, [site], window[None])[site] for window in windows])
    first = torch.arange(len(x)) % 40 == 0
    for sink_tokens, tokens in ((0, x), (1, x[~first])):
        recipe = load_recipe("kvquant").edited({"sink_tokens": sink_tokens, "key": {"threshold_dtype": "float32"}})
        scale = fit(statistics, recipe)[site].tensors()["scale"]
        torch.testing.assert_close(scale, (tokens.amax(0) - tokens.amin(0)) / 15)


# From a model to a file


@pytest.mark.shapes
@every_recipe
def test_calibrate_save_load(tiny_llama: LlamaForCausalLM, tmp_path: Path, name: str) -> None:
    artifact = calib.calibrate(tiny_llama, WINDOWS, name, bits=3)
    assert all(2.9 < q.spec.bits <= 3 for q in artifact.values())
    path = tmp_path / "q.safetensors"
    artifacts.save(artifact, path)
    loaded = artifacts.load(path)
    assert saved(loaded, tmp_path / "again.safetensors") == path.read_bytes()
    assert loaded.manifest == artifact.manifest
    x = torch.randn(10, 16)
    for site, quantizer in artifact.items():
        assert torch.equal(loaded[site].simulate(x), quantizer.simulate(x))
    loaded.check_model(model_fingerprint(tiny_llama, attention_layers(tiny_llama), None))


@every_recipe
def test_more_bits_lower_the_error_of_every_site(tiny_llama: LlamaForCausalLM, name: str) -> None:
    statistics, recipe = gathered(tiny_llama), load_recipe(name)
    recipes = [recipe.edited({"key": {"bits": bits}, "value": {"bits": bits}}) for bits in (2, 3, 4, 5)]
    errors = [relative_errors(tiny_llama, fit(statistics, one)) for one in recipes]
    for site in errors[0]:
        row = [error[site] for error in errors]
        assert row == sorted(row, reverse=True)
        assert row[0] < 0.5
        assert row[-1] < 0.01


def test_sixteen_bits_are_exact(tiny_llama: LlamaForCausalLM) -> None:
    artifact = calib.calibrate(tiny_llama, WINDOWS[:2], bits=16)
    assert {q.kind for q in artifact.values()} == {"identity"}
    assert not any(relative_errors(tiny_llama, artifact).values())


def test_a_recipe_can_be_given_itself(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    recipe = load_recipe("kvquant")
    given, named = (calib.calibrate(tiny_llama, WINDOWS, one) for one in (recipe, "kvquant"))
    assert saved(given, tmp_path / "a.pkl") == saved(named, tmp_path / "b.pkl")


def test_tokens_beyond_the_vocabulary_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(CorpusError, match="expected token ids from 0 to 63; got 160 outside"):
        calib.calibrate(tiny_llama, WINDOWS + 64)
