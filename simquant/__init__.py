"""Use of quantizers in a model's KV cache: simulation, packed caches, eviction, and evaluation."""

from artifacts.model.transformers_release import cache_argument, check_release

check_release()  # before the first import that depends on it

from simquant.cache.errors import CacheStateError
from simquant.cache.packed import packed_cache
from simquant.cache.saving.saved_cache import load_cache, save_cache
from simquant.cache.transformers_cache import PackedCache
from simquant.compat.fake_quant_cache import FakeQuantCache, fake_quant_cache
from simquant.compat.kivi import KIVISettings, memory_savings
from simquant.compat.kivi_cache import KIVICache
from simquant.compat.kivi_patch import patch_model, unpatch_model
from simquant.compat.scope_options import from_scope_options
from simquant.evaluate import NothingQuantizedError, evaluate, evaluate_each, perplexity
from simquant.evaluation.clipping import clipped_shares, drift_warning
from simquant.evaluation.result import EvalResult
from simquant.evaluation.scored_targets import ScoredTargets, strided_windows
from simquant.evaluation.window_log import WindowLog, WindowLogError
from simquant.policy.eviction import Eviction
from simquant.policy.policy import CachePolicy, ResidualWindow
from simquant.protocols.chunking import Chunking
from simquant.protocols.decode import decode_exact
from simquant.simulate import simulate
from simquant.site_losses import SiteLoss, loss_shares, site_losses
from simquant.usage import Usage

__all__ = [
    "CachePolicy",
    "CacheStateError",
    "Chunking",
    "EvalResult",
    "Eviction",
    "FakeQuantCache",
    "KIVICache",
    "KIVISettings",
    "NothingQuantizedError",
    "PackedCache",
    "ResidualWindow",
    "ScoredTargets",
    "SiteLoss",
    "Usage",
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
