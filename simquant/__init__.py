"""How quantizers are used: inside attention, and measured there."""

from simquant.decode import decode_exact
from simquant.errors import CacheStateError
from simquant.evaluate import NothingQuantizedError, evaluate, evaluate_each, perplexity
from simquant.eviction import Eviction
from simquant.fake_quant import fake_quant_cache
from simquant.fake_quant_cache import FakeQuantCache
from simquant.kivi import KIVISettings, memory_savings
from simquant.kivi_cache import KIVICache
from simquant.kivi_patch import patch_model, unpatch_model
from simquant.packed import packed_cache
from simquant.policy import CachePolicy, Window
from simquant.result import EvalResult
from simquant.scope_options import from_scope_options
from simquant.simulate import simulate
from simquant.steps import Steps
from simquant.transformers_cache import PackedCache
from simquant.usage import Usage

__all__ = [
    "CachePolicy",
    "CacheStateError",
    "EvalResult",
    "Eviction",
    "FakeQuantCache",
    "KIVICache",
    "KIVISettings",
    "NothingQuantizedError",
    "PackedCache",
    "Steps",
    "Usage",
    "Window",
    "decode_exact",
    "evaluate",
    "evaluate_each",
    "fake_quant_cache",
    "from_scope_options",
    "memory_savings",
    "packed_cache",
    "patch_model",
    "perplexity",
    "simulate",
    "unpatch_model",
]
