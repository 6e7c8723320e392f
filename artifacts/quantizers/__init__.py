"""The kinds of quantizers, one file each; `artifacts.registry` lists them."""
