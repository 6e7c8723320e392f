"""Scores of windows, their means and standard errors, and the result of an evaluation."""
