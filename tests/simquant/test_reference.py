"""A real trained model reproduces what KVQuant's released functions give on it (figures of shared/data/SOURCES.md)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calib
import simquant
from artifacts.model.attention import attention_layers
from calib.calibration import add_windows, new_statistics
from calib.statistics.model_statistics import ModelStatistics
from kvgauge.cli.calibrate import parser
from kvgauge.cli.options.common import parsed
from kvgauge.configuration.recipe import RecipeConfig, recipe_changes

FULL_PRECISION = 4.814
KVQUANT = [
    (4, "", 4.935),
    (4, "--nuq", 4.913),
    (4, "--nuq --include-sparse --sparsity-threshold 0.99", 4.890),
    (3, "", 5.676),
    (3, "--nuq", 5.287),
    (3, "--nuq --include-sparse --sparsity-threshold 0.99", 5.141),
    (2, "", 18.20),
    (2, "--nuq", 7.432),
    (2, "--nuq --include-sparse --sparsity-threshold 0.99", 6.771),
]


class Reference:
    """The model, its calibration statistics and its evaluation windows."""

    def __init__(self, shared: Path, model: Any, tokenizer: Any) -> None:
        def windows(name: str, split: Any) -> calib.Corpus:
            return calib.load_corpus(
                str(shared / "data" / name), split, lambda s: tokenizer(s, verbose=False).input_ids
            )

        self.model = model
        self.windows = calib.split_windows(windows("tinystories-valid.txt", "evaluation"), seqlen=256, limit=200)
        train = windows("tinystories-train.txt", "calibration")
        layers = attention_layers(model)
        self.statistics: ModelStatistics = new_statistics(model, layers)
        add_windows(model, layers, self.statistics, calib.sample_windows(train, n_windows=16, seqlen=256, seed=0))

    def perplexity(self, recipe: str, flags: str, windows: Tensor | None = None, batch_size: int = 8) -> float:
        base = calib.load_recipe(recipe)
        changes = recipe_changes(parsed(RecipeConfig, parser().parse_args(flags.split())), base.model_dump(mode="json"))
        artifact = calib.fit(self.statistics, base.edited(changes))
        with simquant.simulate(self.model, artifact):
            return simquant.perplexity(self.model, self.windows if windows is None else windows, batch_size=batch_size)


@pytest.fixture(scope="module")
def reference(shared: Path, stories: Any) -> Iterator[Reference]:
    return Reference(shared, *stories)


def test_full_precision_through_the_same_path(reference: Reference) -> None:
    assert reference.perplexity("default", "--abits 16") == pytest.approx(FULL_PRECISION, abs=5e-4)


@pytest.mark.parametrize(("bits", "flags", "official"), KVQUANT)
def test_kvquant_is_within_half_a_percent_of_the_published_code(
    reference: Reference, bits: int, flags: str, official: float
) -> None:
    assert reference.perplexity("kvquant", f"--abits {bits} {flags}") <= 1.005 * official


@pytest.mark.parametrize(("bits", "official"), [(4, 4.913), (3, 5.287), (2, 7.432)])
def test_default_recipe_does_not_lose_to_published_codebooks(reference: Reference, bits: int, official: float) -> None:
    assert reference.perplexity("default", f"--abits {bits} --nuq") <= official


def test_per_channel_keys_beat_per_token_keys(reference: Reference) -> None:
    few = reference.windows[:40]
    per_channel, per_token = (
        reference.perplexity("kvquant", f"--key-bits 3 --value-bits 16 {scope}", few)
        for scope in ("", "--pertoken k_proj v_proj")
    )
    assert per_channel < per_token / 3


def test_batch_size_does_not_matter(reference: Reference) -> None:
    few = reference.windows[:24]
    one, eight = (reference.perplexity("kvquant", "--abits 3", few, batch_size=size) for size in (1, 8))
    assert one == pytest.approx(eight, abs=1e-3)
    assert torch.isfinite(torch.tensor(one))
