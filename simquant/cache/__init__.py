"""Packed KV cache: codes per layer, sequence and site, attention over them, and a transformers `Cache` around both."""
