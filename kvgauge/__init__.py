"""Calibrate, store and evaluate quantizers for the key-value cache of language models."""
