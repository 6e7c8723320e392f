"""Attention over a packed cache, one block of tokens at a time, in place of a model's own attention function."""
