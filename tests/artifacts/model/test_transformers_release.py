"""The supported releases of transformers: 5.17 to 5.24, told by one line elsewhere, and the two names of a cache."""

import importlib
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from artifacts.errors import UnsupportedReleaseError
from artifacts.model.attention import attention_layers
from artifacts.model.transformers_release import (
    NEWEST,
    OLDEST,
    cache_argument,
    cache_keyword,
    check_release,
    passed_cache,
    returned_cache,
)
from kvgauge.cli import calibrate

ADVICE = 'Type: pip install "transformers>=5.17,<5.25"'
IDS = torch.arange(8).view(1, 8)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> object:
    """Makes it look as if another release were installed."""
    version = metadata.version

    def pretend(release: str) -> None:
        monkeypatch.setattr(metadata, "version", lambda name: release if name == "transformers" else version(name))

    return pretend


def test_the_range_is_that_of_the_package() -> None:
    root = Path(__file__).parents[3]
    required = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    beyond = f"{NEWEST[0]}.{NEWEST[1] + 1}"
    assert f"transformers>={OLDEST[0]}.{OLDEST[1]},<{beyond}" in required
    assert f"transformers=={NEWEST[0]}.{NEWEST[1]}." in (root / "constraints.txt").read_text()
    assert f"oldest={OLDEST[0]}.{OLDEST[1]}." in (root / ".ci" / "run").read_text()


@pytest.mark.parametrize("release", ["5.17.0", "5.20.1", "5.24.0", "5.24.3.dev0"])
def test_supported_releases_pass(install, release: str) -> None:
    install(release)
    check_release()


@pytest.mark.parametrize("release", ["4.57.1", "5.2.0", "5.16.9", "5.25.0", "6.0.0.dev0", "17.0"])
def test_other_releases_are_refused_in_one_line(install, tiny_llama: LlamaForCausalLM, release: str) -> None:
    """Above the range a model had no attention layer, and peers quantize nothing there without a word."""
    install(release)
    expected = f"transformers: expected a release from 5.17 to 5.24; got {release}. {ADVICE}"
    for enter in (check_release, lambda: attention_layers(tiny_llama)):
        with pytest.raises(UnsupportedReleaseError) as refusal:
            enter()
        assert str(refusal.value) == expected


@pytest.mark.parametrize("release", ["5.16.0", "5.25.0"])
def test_the_library_refuses_before_it_imports_what_has_moved(
    install, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    install(release)
    monkeypatch.delitem(sys.modules, "simquant", raising=False)
    with pytest.raises(UnsupportedReleaseError, match=release):
        importlib.import_module("simquant")


@pytest.mark.parametrize("release", ["5.16.0", "5.25.0"])
def test_programs_refuse_in_one_line(install, capsys: pytest.CaptureFixture[str], release: str) -> None:
    install(release)
    assert calibrate.main(["demo", "--list-sites"]) == 1
    assert capsys.readouterr().err.strip().splitlines() == [
        f"calibrate: transformers: expected a release from 5.17 to 5.24; got {release}. {ADVICE}"
    ]


def test_a_cache_is_passed_by_the_name_of_the_release(tiny_llama: LlamaForCausalLM) -> None:
    """`past_key_values` is `cache` from 5.24 on, and the old name warns: warnings are errors here."""
    cache = DynamicCache()
    output = tiny_llama(IDS, use_cache=True, **cache_argument(tiny_llama, cache))
    assert returned_cache(output) is cache
    assert cache.get_seq_length() == 8
    generated = tiny_llama.generate(IDS, max_new_tokens=2, pad_token_id=0, **cache_argument(tiny_llama, DynamicCache()))
    assert generated.shape == (1, 10)
    assert [*cache_argument(tiny_llama, cache)] == [cache_keyword(tiny_llama)]
    assert passed_cache(cache_argument(tiny_llama, cache)) is cache
    assert passed_cache({"use_cache": True}) is None


def test_a_wrapper_takes_a_cache_by_the_name_of_what_it_wraps(tiny_llama: LlamaForCausalLM) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama

        def forward(self, *args: object, **kwargs: object) -> object:
            return self.inner(*args, **kwargs)

    wrapper, cache = Wrapper(), DynamicCache()
    assert cache_keyword(wrapper) is None
    wrapper(IDS, **cache_argument(wrapper, cache))
    assert cache.get_seq_length() == 8


def test_every_older_name_is_known() -> None:
    """Attention of a model with code of its own keeps the name that it had when it was written."""

    class Attention(nn.Module):
        def forward(self, x: object, layer_past: object = None) -> None: ...

    assert cache_keyword(Attention()) == "layer_past"
    assert cache_keyword(nn.Linear(1, 1)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert returned_cache({"logits": 0}) is None
