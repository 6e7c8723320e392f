"""Computations and plots of the notebooks."""
