"""Names that a program may rely on: of `kvgauge` and of each package below it, and the base of all errors."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import artifacts
import calib
import kvgauge as kg
import simquant
from artifacts.model.attention import attention_layers

PACKAGES = ("artifacts", "calib", "simquant", "kvgauge")

KVGAUGE = """
    Artifact CachePolicy Hints KVGaugeError Quantizer Site
    cache_argument calibrate dynamic evaluate fit gather load load_cache load_corpus load_recipe open_foreign
    packed_cache perplexity sample_windows save save_cache simulate
"""
ARTIFACTS = """
    Artifact ArtifactError Codes CorruptArtifactError Manifest MismatchError NonFiniteError QuantSpec Quantizer Site
    UnknownKindError UnsupportedModelError UnsupportedVersionError attention_layers load save site_table
"""
CALIB = """
    Corpus CorpusError ModelStatistics Recipe RecipeError calibrate dynamic fit gather load_corpus load_recipe
    sample_windows shipped_recipes split_windows
"""
SIMQUANT = """
    CachePolicy CacheStateError Chunking EvalResult Eviction FakeQuantCache KIVICache KIVISettings NothingQuantizedError
    PackedCache ResidualWindow ScoredTargets SiteLoss Usage WindowLog WindowLogError cache_argument clipped_shares
    decode_exact drift_warning evaluate evaluate_each fake_quant_cache from_scope_options load_cache loss_shares
    memory_savings packed_cache patch_model perplexity save_cache simulate site_losses strided_windows unpatch_model
"""
QUESTIONS = ("What", "How", "Which", "Where", "Whether", "When", "Who", "Why")


@pytest.mark.parametrize(
    ("package", "names"), [(kg, KVGAUGE), (artifacts, ARTIFACTS), (calib, CALIB), (simquant, SIMQUANT)]
)
def test_the_exported_names_are_these(package: Any, names: str) -> None:
    assert sorted(package.__all__) == sorted(names.split())
    assert all(getattr(package, name) is not None for name in package.__all__)


@pytest.mark.parametrize("package", [kg, artifacts], ids=["kvgauge", "artifacts"])
def test_a_name_that_is_not_there_is_an_attribute_error(package: Any) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = package.quantise


@pytest.mark.parametrize("name", KVGAUGE.split())
def test_every_name_is_documented(name: str) -> None:
    """A first line that says what it is or does, and in a function a section for each thing that a caller must know."""
    thing = getattr(kg, name)
    doc = inspect.getdoc(thing)
    assert doc
    assert not doc.startswith(QUESTIONS)
    if inspect.isfunction(thing):
        sections = ("Parameters", "Returns", "Yields")
        found = [section for section in sections if f"{section}\n{'-' * len(section)}\n" in doc]
        returns = inspect.signature(thing).return_annotation not in (None, "None")
        assert found[:1] == ["Parameters"]
        assert len(found) == 1 + returns
        missing = [name for name in inspect.signature(thing).parameters if name not in doc]
        assert not missing


def test_names_are_completed_before_they_are_used() -> None:
    assert {*KVGAUGE.split(), "__version__"} <= set(dir(kg))
    assert kg.__version__.count(".") == 2


@pytest.mark.parametrize(
    "code",
    ["import kvgauge", "import kvgauge as kg; kg.KVGaugeError, kg.Site, kg.__version__", "import kvgauge.cli.main"],
)
def test_the_public_face_needs_no_torch(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"{code}; import sys; assert 'torch' not in sys.modules"], check=True)


# --- one base of all errors

OPTIONAL = ("__main__", "lm_eval_adapter")
"""Modules that run a program, or need a package that is not installed everywhere."""


def exception_classes() -> Iterator[type[BaseException]]:
    for package in PACKAGES:
        for found in pkgutil.walk_packages(
            [str(Path(importlib.import_module(package).__file__ or "").parent)], f"{package}."
        ):
            if found.name.endswith("__main__") or found.name == "kvgauge.running.lm_eval_adapter":
                continue
            module = importlib.import_module(found.name)
            for thing in vars(module).values():
                if inspect.isclass(thing) and issubclass(thing, BaseException) and thing.__module__ == found.name:
                    yield thing


def test_every_error_has_the_one_base() -> None:
    found = set(exception_classes())
    assert {"CorruptArtifactError", "CorpusError", "TaskError", "UsageError"} <= {error.__name__ for error in found}
    assert [error for error in found if not issubclass(error, kg.KVGaugeError)] == []
    old_bases = {
        "CacheStateError": RuntimeError,
        "KVGaugeError": Exception,
        "NothingCached": Exception,
        "UnsupportedLayer": Exception,
        "UsageError": Exception,
    }
    for error in found:
        assert issubclass(error, old_bases.get(error.__name__, ValueError))


def _another_model(model: LlamaForCausalLM) -> None:
    quantizers = kg.dynamic(model)
    with kg.simulate(model, {site: quantizers[site] for site in list(quantizers)[:2]}):
        pass


def _used_twice(model: LlamaForCausalLM) -> None:
    with kg.packed_cache(model, kg.dynamic(model, "fp8-unit")) as new_cache:
        cache = new_cache()
        model(torch.arange(3, 9)[None], **kg.cache_argument(model, cache), use_cache=True)
        kg.load_cache("none.safetensors", cache)


FAMILIES: dict[str, Callable[[LlamaForCausalLM], Any]] = {
    "CorruptArtifactError": lambda model: kg.load("none.safetensors"),
    "CorruptArtifactError of a foreign file": lambda model: kg.open_foreign("none.pkl"),
    "InvalidValueError of a policy": lambda model: kg.CachePolicy(sink_tokens=-1),
    "InvalidValueError of a site": lambda model: kg.Site.parse("layers.0.kye"),
    "InvalidValueError of windows": lambda model: kg.perplexity(model, torch.arange(3, 9)),
    "InvalidValueError of a protocol": lambda model: kg.evaluate(
        model, torch.arange(3, 11)[None], kg.dynamic(model), protocol="decod"
    ),
    "MismatchError": _another_model,
    "RecipeError": lambda model: kg.load_recipe("kvquent"),
    "RecipeError without calibration": lambda model: kg.dynamic(model, "default"),
    "CorpusError": lambda model: kg.load_corpus("none.txt", "calibration", None),
    "CorpusError of the vocabulary": lambda model: kg.gather(model, torch.full((1, 8), 10**6)),
    "UnsupportedModelError": lambda model: kg.dynamic(torch.nn.Linear(2, 2)),
    "CacheStateError": _used_twice,
    "NothingQuantizedError": lambda model: kg.evaluate(
        model, torch.arange(3, 11)[None], kg.dynamic(model), policy=kg.CachePolicy(sink_tokens=8)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_except_clause_takes_them_all(family: str, tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(kg.KVGaugeError) as caught:
        FAMILIES[family](tiny_llama)
    assert type(caught.value).__name__ == family.split()[0]


# --- the verbs


def test_gathering_and_fitting_are_calibration(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.arange(3, 51).reshape(3, 16)
    statistics = kg.gather(tiny_llama, windows, "kvquant")
    for bits in (2, 4):
        fitted, calibrated = (
            kg.fit(statistics, "kvquant", bits=bits),
            kg.calibrate(tiny_llama, windows, "kvquant", bits=bits),
        )
        assert fitted.digest == calibrated.digest
        assert {quantizer.spec.bits for quantizer in fitted.values()} == {bits}


def test_a_recipe_without_calibration_covers_the_model(tiny_llama: LlamaForCausalLM) -> None:
    quantizers = kg.dynamic(tiny_llama, "kvquant", bits=3)
    assert {(site.layer, site.tensor) for site in quantizers} == {(i, t) for i in (0, 1) for t in ("key", "value")}
    assert {quantizer.spec.bits for quantizer in quantizers.values()} == {3}
    assert list(quantizers) == list(kg.dynamic(tiny_llama, "kvquant", layers=attention_layers(tiny_llama)))
    with pytest.raises(kg.KVGaugeError, match=r"recipe default without calibration: .*a basis is fitted"):
        kg.dynamic(tiny_llama, "default")
