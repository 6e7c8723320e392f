"""Calibrate, store and evaluate quantizers for the key-value cache of language models.

`import kvgauge as kg` offers what most programs need. Names are resolved when first used, so that the help texts of the
commands and tools which only read a file's header need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifacts.artifact import Artifact, load, save
    from artifacts.errors import KVGaugeError
    from artifacts.importers.foreign import open_foreign
    from artifacts.importers.hints import Hints
    from artifacts.model.transformers_release import cache_argument
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site
    from calib.calibration import calibrate, gather
    from calib.fitting.dynamic import dynamic
    from calib.fitting.fit import fit
    from calib.recipe.recipe import load_recipe
    from calib.text.corpus import load_corpus
    from calib.text.windows import sample_windows
    from simquant.cache.packed import packed_cache
    from simquant.cache.saving.saved_cache import load_cache, save_cache
    from simquant.evaluate import evaluate, perplexity
    from simquant.policy.policy import CachePolicy
    from simquant.simulate import simulate

    __version__: str

_HOME = {
    "artifacts.artifact": ("Artifact", "load", "save"),
    "artifacts.errors": ("KVGaugeError",),
    "artifacts.importers.foreign": ("open_foreign",),
    "artifacts.importers.hints": ("Hints",),
    "artifacts.model.transformers_release": ("cache_argument",),
    "artifacts.quantizer": ("Quantizer",),
    "artifacts.sites": ("Site",),
    "calib.calibration": ("calibrate", "gather"),
    "calib.fitting.dynamic": ("dynamic",),
    "calib.fitting.fit": ("fit",),
    "calib.recipe.recipe": ("load_recipe",),
    "calib.text.corpus": ("load_corpus",),
    "calib.text.windows": ("sample_windows",),
    "simquant.cache.packed": ("packed_cache",),
    "simquant.cache.saving.saved_cache": ("load_cache", "save_cache"),
    "simquant.evaluate": ("evaluate", "perplexity"),
    "simquant.policy.policy": ("CachePolicy",),
    "simquant.simulate": ("simulate",),
}

__all__ = [
    "Artifact",
    "CachePolicy",
    "Hints",
    "KVGaugeError",
    "Quantizer",
    "Site",
    "cache_argument",
    "calibrate",
    "dynamic",
    "evaluate",
    "fit",
    "gather",
    "load",
    "load_cache",
    "load_corpus",
    "load_recipe",
    "open_foreign",
    "packed_cache",
    "perplexity",
    "sample_windows",
    "save",
    "save_cache",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from artifacts.manifest import tool_version

        return tool_version()
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'kvgauge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
