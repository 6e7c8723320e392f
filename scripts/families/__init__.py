"""Every family of causal language models of transformers, tried with a tiny random model of each.

`python -m scripts.families` prints one row for each family: whether its keys and values are found, quantized and kept
in a packed cache, or the reason why not. The table of `docs/model-families.md` is made from it.
"""
