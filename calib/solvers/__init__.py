"""Numerical solvers behind the estimators: k-means, bit allocation, prediction, entropy-coded indices."""
