"""Triton kernels over the very bytes that quantizers store; they need the extra `triton`, asked for when one starts."""

from simquant.kernels.append import append
from simquant.kernels.attention import decode_attention
from simquant.kernels.tokens import PackedTokens, PlainTokens

__all__ = ["PackedTokens", "PlainTokens", "append", "decode_attention"]
