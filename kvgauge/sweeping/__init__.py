"""Grids of runs: cells, workers, restarts, tables."""
