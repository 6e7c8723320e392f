"""Bit packing, mixed radix, entropy coding, float16 rounding, reproducible sums, and checks of quantizer fields."""
