"""How quantizers are used: inside attention, and measured there."""

from artifacts.transformers_release import cache_argument, check_release

check_release()  # before the first import that depends on it

from simquant.cache.errors import CacheStateError
from simquant.cache.packed import packed_cache
from simquant.cache.policy import CachePolicy, Window
from simquant.cache.saved_cache import load_cache, save_cache
from simquant.cache.transformers_cache import PackedCache
from simquant.evaluate import NothingQuantizedError, evaluate, evaluate_each, perplexity
from simquant.evaluation.clipping import clipped_shares, drift_warning
from simquant.evaluation.decode import decode_exact
from simquant.evaluation.result import EvalResult
from simquant.evaluation.scored_targets import ScoredTargets, strided_windows
from simquant.evaluation.site_losses import SiteLoss, loss_shares, site_losses
from simquant.evaluation.steps import Steps
from simquant.evaluation.window_log import WindowLog, WindowLogError
from simquant.eviction.eviction import Eviction
from simquant.eviction.scope_options import from_scope_options
from simquant.fake_quant.fake_quant import fake_quant_cache
from simquant.fake_quant.fake_quant_cache import FakeQuantCache
from simquant.kivi.kivi import KIVISettings, memory_savings
from simquant.kivi.kivi_cache import KIVICache
from simquant.kivi.kivi_patch import patch_model, unpatch_model
from simquant.simulate import simulate
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
    "ScoredTargets",
    "SiteLoss",
    "Steps",
    "Usage",
    "Window",
    "WindowLog",
    "WindowLogError",
    "cache_argument",
    "clipped_shares",
    "decode_exact",
    "drift_warning",
    "evaluate",
    "evaluate_each",
    "fake_quant_cache",
    "from_scope_options",
    "load_cache",
    "loss_shares",
    "memory_savings",
    "packed_cache",
    "patch_model",
    "perplexity",
    "save_cache",
    "simulate",
    "site_losses",
    "strided_windows",
    "unpatch_model",
]
