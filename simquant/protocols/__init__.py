"""Evaluation protocols full, decode and cache, by the tokens that each query reads quantized."""
