"""Benchmarks, run from a checkout on an idle machine."""
