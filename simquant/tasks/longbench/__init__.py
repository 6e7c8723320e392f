"""LongBench: its tasks, data and metrics."""
