"""Recipes: their files, edits and errors, and the estimator of each site."""
