"""Attention over a packed cache, one block of tokens at a time."""
