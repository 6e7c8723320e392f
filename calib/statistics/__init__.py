"""Calibration statistics: sufficient statistics of fixed memory, mergeable and independent of order."""
