"""Findings of a report that need the model to run."""
