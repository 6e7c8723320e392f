"""Tokens that a packed cache drops for good."""
