"""Triton kernels of decode attention over packed keys and values; `attention` needs Triton, `support` says where."""
