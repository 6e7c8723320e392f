"""Sufficient statistics: fixed memory, mergeable, independent of order."""
