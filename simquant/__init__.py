"""How quantizers are used: inside attention, and measured there."""

from simquant.clipping import clipped_shares, drift_warning
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
from simquant.saved_cache import load_cache, save_cache
from simquant.scope_options import from_scope_options
from simquant.scored_targets import ScoredTargets, strided_windows
from simquant.simulate import simulate
from simquant.site_losses import SiteLoss, loss_shares, site_losses
from simquant.steps import Steps
from simquant.transformers_cache import PackedCache
from simquant.usage import Usage
from simquant.window_log import WindowLog, WindowLogError

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
