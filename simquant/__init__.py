"""How quantizers are used: inside attention, and measured there."""

from simquant.evaluate import NothingQuantizedError, evaluate, perplexity
from simquant.policy import CachePolicy
from simquant.result import EvalResult
from simquant.simulate import simulate
from simquant.usage import Usage

__all__ = ["CachePolicy", "EvalResult", "NothingQuantizedError", "Usage", "evaluate", "perplexity", "simulate"]
