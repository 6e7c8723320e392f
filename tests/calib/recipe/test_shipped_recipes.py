"""Every shipped recipe on made-up activations: it fits, stays finite, counts the bits it says, and is told apart."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import random_llama
from torch import Tensor

from artifacts.model.attention import attention_layers
from artifacts.quantizer import Quantizer
from artifacts.sites import Site, Stage
from artifacts.storage import Stored, read, write
from calib.calibration import add_windows, new_statistics
from calib.estimators.estimator import trial_statistics
from calib.fitting.fit import fit
from calib.recipe.recipe import load_recipe, shipped_recipes
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_shape import SiteShape

pytestmark = pytest.mark.shapes

HEADS, HEAD_DIM = 4, 64
CHANNELS = HEADS * HEAD_DIM
TENSORS = ("key", "value")

every_recipe = pytest.mark.parametrize("name", shipped_recipes())


def quantizers(name: str, x: Tensor) -> dict[str, Quantizer]:
    """Key and value quantizer of a recipe, fitted to `x` as both tokens and gradients."""
    recipe, found = load_recipe(name), {}
    for tensor in TENSORS:
        site = Site(0, "key", recipe.stage) if tensor == "key" else Site(0, "value")
        statistics = trial_statistics(SiteShape(site=site, heads=HEADS, head_dim=HEAD_DIM)).mapped(x, x)
        if tensor == "key":
            statistics.query_energy = torch.ones(CHANNELS, dtype=torch.float64)
            statistics.query_metric = torch.eye(HEAD_DIM, dtype=torch.float64).expand(HEADS, -1, -1)
        else:
            statistics.token_weights = torch.ones(len(x))
        found[tensor] = recipe.estimator(tensor).fit(statistics).quantizer
    return found


def activations(n_tokens: int = 96) -> Tensor:
    x = torch.randn(n_tokens, CHANNELS) * torch.linspace(0.5, 2, CHANNELS)
    return x + torch.linspace(-1, 1, CHANNELS)


def test_each_says_where_it_comes_from_and_no_other() -> None:
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    assert all(recipe.name == name for name, recipe in recipes.items())
    sources = [recipe.source for recipe in recipes.values()]
    assert all(sources)
    assert len(set(sources)) == len(sources)


@every_recipe
def test_constant_and_zero_channels_are_fitted_and_stay_finite(name: str) -> None:
    x = activations()
    x[:, 5], x[:, 7], x[:, 200] = 3.7, 0.0, -1e-3
    for quantizer in quantizers(name, x).values():
        decoded = quantizer.simulate(x)
        assert torch.isfinite(decoded).all()
        assert float((decoded - x)[:, [5, 7, 200]].abs().max()) < 0.75 * float(x.abs().max())


@every_recipe
def test_tokens_that_are_all_alike_are_fitted(name: str) -> None:
    for value in (0.0, 2.5):
        x = torch.full((64, CHANNELS), value)
        for quantizer in quantizers(name, x).values():
            decoded = quantizer.simulate(x)
            assert torch.isfinite(decoded).all()
            assert float((decoded - x).abs().max()) <= 3 * abs(value) + 1e-6


@cache
def one_token_repeated(stage: Stage) -> ModelStatistics:
    model = random_llama(hidden_size=128, head_dim=32)
    layers = attention_layers(model)
    statistics = new_statistics(model, layers, stage=stage, tier="full", fisher=True)
    add_windows(model, layers, statistics, torch.full((2, 48), 7))
    return statistics


@every_recipe
def test_one_token_repeated_is_fitted(name: str) -> None:
    """Its covariances are rounding, of which some matrices are not positive: LinAlgError."""
    recipe = load_recipe(name)
    for site, quantizer in fit(one_token_repeated(recipe.stage), recipe).items():
        assert all(torch.isfinite(x).all() for x in quantizer.tensors().values() if x.is_floating_point()), site


@pytest.mark.parametrize("name", ["eigen", "predictive"])
def test_one_token_repeated_shares_a_budget(name: str) -> None:
    recipe = load_recipe(name).edited({"target_bits": 2.0})
    assert len(fit(one_token_repeated("pre_rope"), recipe)) == 4


@pytest.mark.parametrize(
    ("name", "key_bits", "value_bits"),
    [
        ("default", 3.875, 4 + (32 + 3 * 24) / CHANNELS),
        ("kvquant-3", 3.0, 3 + 32 / CHANNELS),
        ("kvquant-rank", 4 + 3 * 24 / CHANNELS, 4 + (32 + 3 * 24) / CHANNELS),
        ("kvquant-3-compact", 3 + (8 + 6) / HEAD_DIM, 3 + (8 + 6) / HEAD_DIM + 32 / CHANNELS),
        ("int8-per-channel", 8.0, 8.0),
        ("kivi-2", 2 + 32 / 32, 2 + 32 / 32),
        ("kivi-4", 4 + 32 / 32, 4 + 32 / 32),
        ("quarot-4", 4 + 32 / HEAD_DIM, 4 + 32 / HEAD_DIM),
        ("rotatekv-2", 2 + 32 / HEAD_DIM, 2 + 32 / HEAD_DIM),
        ("oscar-2", 2 + 32 / HEAD_DIM, 2 + 32 / HEAD_DIM),
        ("turboquant-3", 3 + 16 / HEAD_DIM, 3 + 16 / HEAD_DIM),
        ("transformers-quantized", 4 + 32 / 64, 4 + 32 / 64),
        ("llama-cpp-q8-0", 8.5, 8.5),
        ("llama-cpp-q4-0-hadamard", 4.5, 4.5),
        ("fp8", 8.0, 8.0),
        ("fp8-token", 8 + 16 / HEAD_DIM, 8 + 16 / HEAD_DIM),
        ("mxfp4", 4.25, 4.25),
        ("nvfp4", 4.5, 4.5),
    ],
)
def test_bits_are_those_of_the_method(name: str, key_bits: float, value_bits: float) -> None:
    """Counted from the stored bytes of whole groups of tokens, without what is stored once."""
    x = activations()
    found = [q.encode(x).nbytes * 8 / x.numel() for q in quantizers(name, x).values()]
    assert found == pytest.approx([key_bits, value_bits], rel=1e-12)


@pytest.mark.parametrize("name", ["eigen", "eigen-fisher"])
@pytest.mark.parametrize("bits", [1.25, 2.0, 2.5, 4.0])
def test_eigen_keeps_its_budget(name: str, bits: float) -> None:
    x = activations(400)
    recipe = load_recipe(name).edited({tensor: {"bits": bits} for tensor in TENSORS})
    for tensor in TENSORS:
        site = Site(0, "key", "pre_rope") if tensor == "key" else Site(0, "value")
        statistics = trial_statistics(SiteShape(site=site, heads=HEADS, head_dim=HEAD_DIM)).mapped(x, x)
        statistics.query_metric = torch.eye(HEAD_DIM, dtype=torch.float64).expand(HEADS, -1, -1)
        statistics.token_weights = torch.ones(len(x))
        stored = recipe.estimator(tensor).fit(statistics).quantizer.encode(x)
        assert bits - 8 / CHANNELS <= stored.nbytes * 8 / x.numel() <= bits


@every_recipe
def test_what_is_fitted_can_be_stored_and_read_again(name: str, tmp_path: Path) -> None:
    """A dtype that the reader refuses was once written."""
    path = tmp_path / "q.safetensors"
    arrays = {
        f"{tensor}.{part}": array.numpy()
        for tensor, quantizer in quantizers(name, activations()).items()
        for part, array in quantizer.tensors().items()
    }
    write(path, Stored(format="test", header={}, arrays=arrays))
    again = read(path, "test").arrays
    assert all(np.array_equal(again[part], array) for part, array in arrays.items())


def test_recipes_that_read_gradients_say_so() -> None:
    needing = {name for name in shipped_recipes() if load_recipe(name).needs_fisher}
    assert needing == {name for name in shipped_recipes() if "fisher" in name}
