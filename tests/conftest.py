"""What every test shares: shapes checked at run time, no network, fixed seeds, and three models to run on."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg")  # read when the libraries are imported

import jaxtyping
import pytest

pytest.register_assert_rewrite("helpers")  # before their import: they assert

# Checks each jaxtyping annotation of the three packages; it must stand before their first import. A check takes longer
# than most of the functions that it guards: `pytest_runtest_protocol` below says which tests pay for it.
jaxtyping.install_import_hook(["artifacts", "calib", "simquant"], "beartype.beartype")

import gc
import random
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from helpers.models import random_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores: more threads only wait for each other


def pytest_collection_finish() -> None:
    """From here on the garbage collector leaves the million objects of libraries and tests alone."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Shapes are checked in tests marked `shapes` and in the examples of docstrings; between them all are reached."""
    jaxtyping.config.update(
        "jaxtyping_disable", isinstance(item, pytest.Function) and item.get_closest_marker("shapes") is None
    )
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, alone or in the suite."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy generator is what scikit-learn falls back to
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A fresh random Llama: 2 layers, 4 query heads on 2 KV heads of head_dim 8, vocab 64, context 128."""
    return random_llama()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder beside the checkout (or $KVGAUGE_SHARED); without it the test is skipped."""
    path = Path(os.environ.get("KVGAUGE_SHARED") or Path(__file__).parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"shared: a data folder was expected; {path} does not exist; set KVGAUGE_SHARED")
    return path


@pytest.fixture(scope="session")
def stories(shared: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The trained model stories260k and its tokenizer, loaded once: leave the model as you found it."""
    folder = shared / "data" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"stories: the model stories260k was expected; {folder} does not exist")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
